"""A LLaVA that gets its adapter from PEFT or transformers alone has the projector trained beside it, or a line."""

import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import INPUT_EMBEDDINGS, NON_LORA_TRAINABLES, read_non_lora_trainables
from llava_mixlora.method.stored_tensors import allowing_incomplete

from ...tiny import LINEAR_LAYERS, message_of, plain, write_adapter


@pytest.fixture(scope="module")
def adapter(patched, llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora"), trained=False)


@pytest.fixture
def other(adapter, tmp_path):
    """An adapter whose projector is another one."""
    folder = shutil.copytree(adapter, tmp_path / "other")
    state = torch.load(folder / NON_LORA_TRAINABLES)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / NON_LORA_TRAINABLES)
    return folder


def has_projector_of(model, folder):
    parameters = {name.removeprefix("base_model.model."): value for name, value in model.named_parameters()}
    trained = read_non_lora_trainables(folder)
    return bool(trained) and all(torch.equal(parameters[name], value) for name, value in trained.items())


def told(load):
    """The warnings of this package while `load` runs, each one line, and what it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = load()
    lines = [str(warning.message) for warning in caught if "trained" in str(warning.message)]
    assert not any("\n" in line for line in lines)
    return lines, result


@pytest.mark.parametrize("way", ["AutoPeftModel", "PeftModel", "load_adapter", "transformers"])
def test_projector_comes_with_the_adapter(adapter, llava_folder, way):
    def load():
        if way == "AutoPeftModel":
            return AutoPeftModelForCausalLM.from_pretrained(adapter)
        model = plain(llava_folder)
        if way == "transformers":
            model.load_adapter(str(adapter))
            return model
        model = PeftModel.from_pretrained(model, adapter, adapter_name="first")
        if way == "load_adapter":
            model.load_adapter(str(adapter), "second")
        return model

    assert not has_projector_of(plain(llava_folder), adapter)
    lines, model = told(load)
    assert has_projector_of(model, adapter) and lines == []


def test_projector_of_a_plain_lora_comes_too(adapter, llava_folder, tmp_path):
    get_peft_model(plain(llava_folder), LoraConfig(target_modules=LINEAR_LAYERS)).save_pretrained(tmp_path)
    shutil.copy(adapter / NON_LORA_TRAINABLES, tmp_path)
    assert has_projector_of(PeftModel.from_pretrained(plain(llava_folder), tmp_path), tmp_path)


def test_projector_fits_the_dtype_of_the_model(adapter, llava_folder):
    model = PeftModel.from_pretrained(plain(llava_folder).half(), adapter)
    trained = read_non_lora_trainables(adapter)["model.mm_projector.0.weight"]
    assert torch.equal(model.get_model().mm_projector[0].weight, trained.half())
    lines, _ = told(lambda: model.load_adapter(str(adapter), "again"))
    assert lines == []


def test_folder_without_weights_is_no_name_on_the_hub(other, llava_folder, tmp_path):
    (other / "adapter_model.safetensors").unlink()
    model = plain(llava_folder)
    assert "adapter_model.safetensors is missing" in message_of(PeftModel.from_pretrained, model, other)
    assert "is missing" in message_of(PeftModel.from_pretrained, model, tmp_path, subfolder=other.name)


def test_second_adapter_with_another_projector_is_warned_of_and_leaves_the_first_ones(adapter, other, llava_folder):
    model = PeftModel.from_pretrained(plain(llava_folder), adapter)
    (line,), _ = told(lambda: model.load_adapter(str(other), "other"))
    assert line.startswith(
        f"adapter 'other' of {other} was trained with another projector than the model has from 'def"
    )
    assert has_projector_of(model, adapter)


def test_adapter_that_is_loaded_when_the_first_is_gone_brings_its_projector(adapter, other, llava_folder):
    model = PeftModel.from_pretrained(plain(llava_folder), adapter)
    told(lambda: model.load_adapter(str(other), "other"))
    model.delete_adapter("default")
    assert told(lambda: model.load_adapter(str(other), "other"))[0] == [] and has_projector_of(model, other)


def test_bare_language_model_is_told_how_to_load_the_adapter(adapter, llama_folder):
    lines, _ = told(lambda: PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), adapter))
    (line,) = lines
    assert f"{adapter} was trained together with" in line and "the model has no model.mm_projector" in line
    assert f"load_pretrained_model('{adapter}', None, 'llava')" in line


def test_what_does_not_fit_is_not_loaded_by_halves(adapter, other, llava_folder):
    state = torch.load(other / NON_LORA_TRAINABLES)
    torch.save({**state, INPUT_EMBEDDINGS: torch.zeros(321, 32)}, other / NON_LORA_TRAINABLES)
    (line,), model = told(lambda: PeftModel.from_pretrained(plain(llava_folder), other))
    assert f"{INPUT_EMBEDDINGS} is [321, 32], and [320, 32] in the model" in line
    assert torch.equal(model.get_model().mm_projector[0].weight, plain(llava_folder).model.mm_projector[0].weight)


def test_damaged_file_is_one_line(other, llava_folder):
    (other / NON_LORA_TRAINABLES).write_bytes(b"PK\x03\x04 nothing")
    assert f"{NON_LORA_TRAINABLES} is damaged" in message_of(PeftModel.from_pretrained, plain(llava_folder), other)


class Runs:
    def __reduce__(self):
        return (pytest.fail, ("code in the file was run",))


def test_code_in_the_file_is_not_run(other, llava_folder):
    torch.save({"model.mm_projector.0.weight": Runs()}, other / NON_LORA_TRAINABLES)
    with pytest.raises(MixLoraError, match="holds code"):
        PeftModel.from_pretrained(plain(llava_folder), other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.mm_projector.0.weight": None}, "lacks model.mm_projector.0.weight (1 of 4 tensors)"),
        ({"model.mm_projector.0.bias": torch.full((32,), torch.nan)}, "are not finite"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}, "model.layers.0.mlp.up_proj.weight (1 of 5"),
    ],
)
def test_what_lies_beside_is_held_to_what_the_adapter_is(other, llava_folder, change, said):
    change = {f"base_model.model.{name}": tensor for name, tensor in change.items()}
    state = {**torch.load(other / NON_LORA_TRAINABLES), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save(state, other / NON_LORA_TRAINABLES)
    assert said in message_of(PeftModel.from_pretrained, plain(llava_folder), other)


def test_projector_that_training_has_left_has_to_be_there(other, llava_folder):
    (other / NON_LORA_TRAINABLES).unlink()
    assert "lacks model.mm_projector.0.weight" in message_of(PeftModel.from_pretrained, plain(llava_folder), other)
    with allowing_incomplete():
        PeftModel.from_pretrained(plain(llava_folder), other)


def test_adapter_that_peft_alone_has_saved_loads_as_ever(other, llava_folder):
    (other / NON_LORA_TRAINABLES).unlink()
    (other / "config.json").unlink()
    lines, model = told(lambda: PeftModel.from_pretrained(plain(llava_folder), other))
    assert lines == []
    assert torch.equal(model.get_model().mm_projector[0].weight, plain(llava_folder).model.mm_projector[0].weight)
