"""A folder with an adapter is no whole model, and who takes it for one is told; older transformers loads the base."""

import pytest
from transformers import AutoModelForCausalLM

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES

from ...tiny import write_adapter


@pytest.fixture(scope="module")
def adapter(patched, llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora"), trained=False)


def loader(name):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    classes = (AutoModelForCausalLM, LlavaLlamaForCausalLM, LlavaMistralForCausalLM)
    return {each.__name__: each for each in classes}[name].from_pretrained


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"])
def test_adapter_is_named_with_what_loads_it(adapter, name):
    try:
        model = loader(name)(adapter)
    except MixLoraError as error:
        line = str(error)
    else:
        assert model.peft_config  # transformers 4.37 has put the adapter on its base
        return
    assert "\n" not in line and line.startswith(
        f"{adapter} holds an adapter, not a whole model; load it with peft.Auto"
    )
    assert f"load_pretrained_model({str(adapter)!r}, None, 'llava-lora')" in line


def test_other_folders_without_weights_fail_as_ever(adapter, tmp_path):
    (tmp_path / "config.json").write_bytes((adapter / "config.json").read_bytes())
    (tmp_path / NON_LORA_TRAINABLES).write_bytes(b"")
    with pytest.raises(OSError):
        loader("LlavaLlamaForCausalLM")(tmp_path)
