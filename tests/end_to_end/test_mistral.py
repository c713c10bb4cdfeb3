"""A Mistral below LLaVA, from training to a merged checkpoint, and an MPT, which is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import MistralConfig, MistralForCausalLM

from llava_mixlora.adapters.adapter_folder import is_mixlora_adapter
from llava_mixlora.inference.loading import load_for_inference

from ..conftest import PACKABLE_LLAMA
from ..tiny import VOCABULARY, layers
from .training import ALONE, environment, train

WINDOW = 8  # shorter than any prompt: a Llama would look further back
MIXLORA = ["--mixlora_enable=True", "--mixlora_num_factors=4", "--per_device_train_batch_size=8"]


@pytest.fixture(scope="module")
def base(tokenizer_folder, tmp_path_factory):
    """A bare language model, as --model_name_or_path names it."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("bare") / "mistral"
    config = MistralConfig(vocab_size=VOCABULARY, sliding_window=WINDOW, **PACKABLE_LLAMA)
    MistralForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def adapter(base, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "llava-mistral-mixlora"
    train(ALONE, [f"--model_name_or_path={base}", *inputs[1:]], folder, *MIXLORA)
    return folder


@pytest.fixture
def load(patched):
    from llava.model.builder import load_pretrained_model

    def load(folder, **options):
        return load_pretrained_model(str(folder), None, folder.name, device="cpu", **options)[1]

    return load


def generate(model):
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(model.dtype)
    ids = torch.tensor([[1, *range(5, 5 + WINDOW), -200, 7, 8, 9]])
    options = {"images": images, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    return model.generate(ids, **options)


def class_of(model):
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def test_training_keeps_a_mistral_a_mistral(adapter):
    assert is_mixlora_adapter(adapter)
    config = json.loads((adapter / "config.json").read_text())
    assert config["model_type"] == "llava_mistral" and config["sliding_window"] == WINDOW


@pytest.mark.parametrize(
    "options, layer",
    [({}, torch.nn.Linear), ({"load_4bit": True}, Linear4bit), ({"load_8bit": True}, Linear8bitLt)],
    ids=["16 bits", "4 bits", "8 bits"],
)
def test_adapter_loads_on_its_base_and_generates(load, adapter, options, layer):
    model = load(adapter, **options)
    assert class_of(model) == "LlavaMistralForCausalLM"
    assert len(layers(model)) == 14
    assert all(type(adapted.base_layer) is layer for adapted in layers(model).values())
    assert generate(model).shape == (1, 6)


def test_name_of_the_folder_does_not_decide(load, adapter, tmp_path):
    renamed = shutil.copytree(adapter, tmp_path / "llava-mixlora")
    assert torch.equal(generate(load(renamed)), generate(load(adapter)))


def test_command_merges_the_adapter_into_a_mistral(load, base, adapter, tmp_path):
    merged = tmp_path / "llava-mistral-merged"
    words = ["--model-path", adapter, "--model-base", base, "--save-model-path", merged, "--steps", "3", "--force"]
    command = [sys.executable, "-m", "llava_mixlora", "merge", *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    model = load(merged)
    assert class_of(model) == "LlavaMistralForCausalLM" and not layers(model)
    assert generate(model).shape == (1, 6)
    assert class_of(load_for_inference(merged)[1]) == "LlavaMistralForCausalLM"  # as llava-mixlora eval loads it


def mpt(place, name, kind):
    folder = place / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


@pytest.mark.parametrize(
    "name, kind, expected", [("m", "mpt", "an MPT model"), ("mpt-7b", "llama", "'mpt' in its path")]
)
def test_training_an_mpt_is_refused_before_it_is_loaded(inputs, tmp_path_factory, name, kind, expected):
    place = tmp_path_factory.mktemp("other")
    flags = [f"--model_name_or_path={mpt(place, name, kind)}", *inputs[1:], *MIXLORA, f"--output_dir={place / 'out'}"]
    done = subprocess.run([*ALONE, *flags], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    assert str(place / name) in line and expected in line and "Mistral" in line
    assert "Traceback" not in done.stderr


def test_loading_an_adapter_of_an_mpt_is_refused(load, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "llava-mixlora")
    (other / "config.json").write_text(json.dumps({"model_type": "llava_mpt"}))
    with pytest.raises(ValueError, match="model_type='llava_mpt', and MPT is not supported"):
        load(other)
