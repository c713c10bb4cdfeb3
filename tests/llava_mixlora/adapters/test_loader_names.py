"""Whether LLaVA's loader takes a folder, by its name, for what it is."""

import pytest

from llava_mixlora.adapters.loader_names import loader_name, misleading


@pytest.mark.parametrize(
    "folder, model_type",
    [
        ("out/llava-merged", "llava_llama"),
        ("LLaVA-v1.5-7b", "llava_llama"),
        ("llava-mistral-merged", "llava_mistral"),
        ("llava-out/checkpoint-7", "llava_llama"),
        ("anything", "llama"),
        ("anything", None),
    ],
)
def test_name_that_takes_the_right_branch_is_left_alone(folder, model_type):
    assert misleading(folder, model_type) is None


@pytest.mark.parametrize(
    "folder, model_type, told",
    [
        ("out/merged", "llava_llama", "'merged' has no 'llava'; rename it, such as to 'llava-merged'"),
        ("llava-vs-mpt", "llava_llama", "'llava-vs-mpt' has 'mpt'; rename it, such as to 'llava-vs'"),
        ("llava-lora", "llava_llama", "'llava-lora' has 'lora'; rename it, such as to 'llava'"),
        ("out/checkpoint-7", "llava_llama", "'out_checkpoint-7' has no 'llava'; rename it, such as to 'llava-out-ch"),
        ("llava-7b", "llava_mistral", "'llava-7b' has no 'mistral'; rename it, such as to 'mistral-llava-7b'"),
        ("MixLoRA", "llava_llama", "'MixLoRA' has no 'llava' and has 'lora'; rename it, such as to 'llava-Mix'"),
    ],
)
def test_name_that_misleads_is_told_with_a_better_one(tmp_path, folder, model_type, told):
    line = misleading(tmp_path / folder, model_type)
    assert line.startswith(told)
    better = line.rpartition("'")[0].rpartition("'")[2]
    assert misleading(tmp_path / better, model_type) is None


def test_names_for_the_loader_take_the_branch_of_their_type():
    for model_type in ("llava_llama", "llava_mistral"):
        assert misleading(loader_name(model_type), model_type) is None
    assert loader_name("llava_llama", is_adapter=True) == "llava-lora" and loader_name("gpt2") is None


def test_name_for_a_forks_own_loader_is_told():
    line = misleading("out/merged", "earthy", its_own="earthgpt")
    assert line == "'merged' has no 'earthgpt'; rename it, such as to 'earthgpt-merged'"
    assert misleading("out/EarthGPT-merged", "earthy", its_own="earthgpt") is None
