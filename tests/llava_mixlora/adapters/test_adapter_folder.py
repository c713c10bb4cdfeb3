"""Reading what training left on disk, with errors a user can act on."""

import json
import stat

import pytest
import torch

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.adapters.adapter_folder import (
    NON_LORA_TRAINABLES,
    is_mixlora_adapter,
    read_non_lora_trainables,
    weights_of,
    write_non_lora_trainables,
)
from llava_mixlora.writing import save_tensors


@pytest.fixture
def folder(tmp_path):
    """An adapter folder whose base model is a folder beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    MixLoraConfig(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    save_tensors({"a": torch.ones(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path / "adapter"


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_mixlora_folder_is_recognised(folder):
    assert is_mixlora_adapter(folder) and is_mixlora_adapter(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"peft_type": "LORA"}', "{}", "\udc80"])
def test_anything_else_is_not(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert not is_mixlora_adapter(tmp_path)


def test_missing_folder_and_hub_names_are_not(tmp_path):
    assert not is_mixlora_adapter(tmp_path / "missing")
    assert not is_mixlora_adapter("liuhaotian/llava-v1.5-7b")


def test_missing_weights_are_named(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MixLoraError, match="adapter_model.safetensors is missing"):
        weights_of(folder)


def test_projector_is_keyed_as_in_the_bare_model(folder):
    weight = torch.randn(2, 3)
    torch.save({"base_model.model.model.mm_projector.0.weight": weight}, folder / NON_LORA_TRAINABLES)
    (name,), (tensor,) = zip(*read_non_lora_trainables(folder).items())
    assert name == "model.mm_projector.0.weight" and torch.equal(tensor, weight)


def test_nothing_trained_beside_the_adapter_is_no_error(folder):
    assert read_non_lora_trainables(folder) == {}


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(100)])
def test_damaged_projector_is_named_in_one_line(folder, content):
    (folder / NON_LORA_TRAINABLES).write_bytes(content)
    with pytest.raises(MixLoraError, match=f"{NON_LORA_TRAINABLES} is damaged") as error:
        read_non_lora_trainables(folder)
    assert "\n" not in str(error.value)


class Sentinel:
    executed = False

    def __reduce__(self):
        return setattr, (Sentinel, "executed", True)


def test_pickled_code_is_not_executed(folder):
    torch.save({"weight": Sentinel()}, folder / NON_LORA_TRAINABLES)
    with pytest.raises(MixLoraError, match=r"holds code \('.*setattr'\), which was not executed"):
        read_non_lora_trainables(folder)
    assert not Sentinel.executed


def test_projector_is_held_twice_with_equal_values(folder):
    state = {"base_model.model.model.mm_projector.weight": torch.randn(2, 3).t()}
    write_non_lora_trainables(folder, state)
    assert torch.equal(torch.load(folder / NON_LORA_TRAINABLES, weights_only=True).popitem()[1], state.popitem()[1])
    read = read_non_lora_trainables(folder)
    (folder / NON_LORA_TRAINABLES).unlink()
    assert read_non_lora_trainables(folder).keys() == read.keys() == {"model.mm_projector.weight"}
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1


def test_projectors_that_differ_are_refused(folder):
    name = "base_model.model.model.mm_projector.weight"
    write_non_lora_trainables(folder, {name: torch.zeros(2)})
    torch.save({name: torch.ones(2)}, folder / NON_LORA_TRAINABLES)
    with pytest.raises(MixLoraError, match="hold different tensors"):
        read_non_lora_trainables(folder)


def test_tensor_larger_than_its_file_is_refused(folder):
    torch.save({"model.mm_projector.weight": torch.ones(1).expand(10**9, 10**9)}, folder / NON_LORA_TRAINABLES)
    with pytest.raises(MixLoraError, match="is larger than what the file holds of it"):
        read_non_lora_trainables(folder)
