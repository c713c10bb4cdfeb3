"""Checkpoint folders of every layout, read tensor by tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.stored_weights import StoredWeights, check_folder_is_no_wrapped_model

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
LAYOUTS = [(suffix, shards) for suffix in ("safetensors", "bin") for shards in (1, 2)]


def write(folder, suffix, shards):
    """Save `TENSORS` as transformers does; returns the files."""
    save = save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if shards == 1:
        save(TENSORS, folder / f"{stem}.{suffix}")
        return [folder / f"{stem}.{suffix}"]
    names = {tensor: f"{stem}-{position}-of-2.{suffix}" for position, tensor in enumerate(TENSORS, 1)}
    for tensor, name in names.items():
        save({tensor: TENSORS[tensor]}, folder / name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    return [folder / name for name in names.values()]


@pytest.mark.parametrize("suffix, shards", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path, suffix, shards):
    write(tmp_path, suffix, shards)
    stored = StoredWeights(tmp_path)
    assert set(stored) == set(TENSORS) and len(stored) == 2 and "c" not in stored
    assert all(torch.equal(stored[name], tensor) for name, tensor in TENSORS.items())


def test_state_dict_of_an_old_torch_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(StoredWeights(tmp_path)["a.weight"], TENSORS["a.weight"])


def message_of(folder):
    with pytest.raises(MixLoraError) as error:
        StoredWeights(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix, shards", LAYOUTS)
def test_damaged_file_is_named(tmp_path, suffix, shards):
    file = write(tmp_path, suffix, shards)[-1]
    file.write_bytes(file.read_bytes()[:-3])
    assert f"{file} " in message_of(tmp_path) and "damaged" in message_of(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shard_is_named(tmp_path, suffix):
    write(tmp_path, suffix, 2)[0].unlink()
    assert "1-of-2" in message_of(tmp_path) and "is missing" in message_of(tmp_path)


def test_index_cannot_lead_out_of_the_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path, "bin", 1)
    index = {"weight_map": {"b": "../pytorch_model.bin"}}
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "is missing" in message_of(inner)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", "[1]"])
def test_damaged_index_is_named(tmp_path, content):
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    assert "index.json is damaged" in message_of(tmp_path)


def test_folder_without_weights_is_named(tmp_path):
    assert f"{tmp_path} holds no weights" in message_of(tmp_path)


@pytest.mark.parametrize("suffix, shards", [layout for layout in LAYOUTS if layout != ("bin", 1)])
def test_model_saved_with_an_adapter_around_its_layers_is_refused(tmp_path, monkeypatch, suffix, shards):
    write(tmp_path, suffix, shards)
    check_folder_is_no_wrapped_model(tmp_path)
    monkeypatch.setitem(TENSORS, "q_proj.base_layer.weight", torch.ones(2))
    write(tmp_path, suffix, shards)
    with pytest.raises(MixLoraError, match="1 tensors such as q_proj.base_layer.weight: .*expected a whole model") as e:
        check_folder_is_no_wrapped_model(tmp_path)
    assert "\n" not in str(e.value)


def test_folder_without_weights_is_not_looked_at(tmp_path):
    check_folder_is_no_wrapped_model(tmp_path)
    check_folder_is_no_wrapped_model("owner/name")
