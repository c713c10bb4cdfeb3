"""Two copies of a model have one fingerprint, and two models have two."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mixlora.adapters.fingerprints import fingerprint, weights_fingerprint

pytestmark = pytest.mark.one_stack


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"hidden_size": 8, "vocab_size": 10, "rope_theta": 1e4, "transformers_version": "4.31"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {"a": 0}}}))
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(16, 8, generator=generator) for n in range(3)}
    save_file({**weights, "model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


def other(base, name, **changes):
    copy = shutil.copytree(base, base.parent / name)
    for file, change in changes.items():
        path = copy / f"{file}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return copy


def differences(one, another):
    return fingerprint(str(another)).differences(fingerprint(str(one)))


def test_copy_is_the_same_model(base):
    assert differences(base, other(base, "copy", config={"transformers_version": "5.23", "_name_or_path": "x"})) == []


def test_same_weights_in_pickled_shards_of_bfloat16_are_the_same(base):
    copy = other(base, "copy")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for number, name in enumerate(names):
        torch.save({name: weights[name]}, copy / f"pytorch_model-{number}.bin")
        places[name] = f"pytorch_model-{number}.bin"
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert weights_fingerprint(copy) == weights_fingerprint(base) is not None
    assert differences(base, copy) == []


def test_tower_that_is_stored_along_does_not_count(base):
    copy = other(base, "copy")
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.vision_tower.weight": torch.ones(4, 4)}, copy / "model.safetensors")
    assert differences(base, copy) == []


@pytest.mark.parametrize("layer", range(3))
def test_change_of_any_layer_is_seen(base, layer):
    copy = other(base, "copy")
    weights = load_file(copy / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.up_proj.weight"] += 0.01
    save_file(weights, copy / "model.safetensors")
    assert differences(base, copy) == ["its weights differ"]


def test_configuration_is_told_by_field_and_value(base):
    assert differences(base, other(base, "copy", config={"rope_theta": 5e5})) == [
        "its rope_theta is 500000.0 and not 10000.0"
    ]


def test_tokenizer_is_told_apart_from_the_weights(base):
    rewritten = other(base, "rewritten", tokenizer={"version": "2.0"})
    assert differences(base, rewritten) == []
    another = other(base, "another", tokenizer={"model": {"vocab": {"a": 0, "b": 1}}})
    assert differences(base, another) == ["its tokenizer differs (tokenizer.json)"]


def test_image_processing_is_told_by_field(base):
    (base / "preprocessor_config.json").write_text(json.dumps({"size": 336, "image_mean": [0.5, 0.5, 0.5]}))
    same = {"size": {"height": 336, "width": 336}}
    assert differences(base, other(base, "copy", preprocessor_config=same)) == []
    (found,) = differences(base, other(base, "smaller", preprocessor_config={"size": 224}))
    assert found == "it processes images with size 224 and not 336"


@pytest.mark.parametrize("size", [{"height": [336], "width": {}}, {}, [], "wide " * 100])
def test_strange_sizes_on_record_are_another_processing(base, size):
    (base / "preprocessor_config.json").write_text(json.dumps({"size": 336}))
    recorded = replace(fingerprint(str(base)), image_processing={"size": size})
    (found,) = fingerprint(str(base)).differences(recorded)
    assert found.startswith("it processes images with size 336 and not") and len(found) < 200


def test_what_is_not_known_is_not_compared(base):
    copy = other(base, "copy")
    (copy / "model.safetensors").write_bytes(b"broken")
    (copy / "tokenizer.json").unlink()
    assert differences(base, copy) == []
    assert fingerprint(str(base.parent / "nothing")) is None
