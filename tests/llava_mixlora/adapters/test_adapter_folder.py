"""Reading what training left on disk, with errors a user can act on."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.adapters.adapter_folder import (
    NON_LORA_TRAINABLES,
    check_adapter,
    is_mixlora_adapter,
    read_non_lora_trainables,
)


@pytest.fixture
def folder(tmp_path):
    """An adapter folder whose base model is a folder beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    MixLoraConfig(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
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


def test_intact_weights_pass(folder):
    check_adapter(folder)


@pytest.mark.parametrize("kept", [0, 3, 20, -1])
def test_truncated_weights_are_named(folder, kept):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(MixLoraError, match="adapter_model.safetensors is damaged"):
        check_adapter(folder)


def test_missing_weights_are_named(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MixLoraError, match="adapter_model.safetensors is missing"):
        check_adapter(folder)


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
    with pytest.raises(MixLoraError, match="is damaged"):
        read_non_lora_trainables(folder)
    assert not Sentinel.executed
