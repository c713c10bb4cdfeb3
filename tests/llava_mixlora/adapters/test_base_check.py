"""An adapter knows its base and its vision tower again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llava_mixlora.adapters.adapter_record import RECORD, AdapterRecord, known_model
from llava_mixlora.adapters.base_check import check_base, check_tower, record_of_merged
from llava_mixlora.adapters.fingerprints import fingerprint

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 10}


@pytest.fixture
def place(tmp_path):
    """A base, a tower, and an adapter that was trained with them and has more tokens."""
    for name, config in {"base": CONFIG, "tower": {"patch_size": 14}, "adapter": {**CONFIG, "vocab_size": 12}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    save_file({"up_proj.weight": torch.eye(4)}, tmp_path / "base" / "model.safetensors")
    save_file({"up_proj.mixlora_A": torch.ones(2, 4)}, tmp_path / "adapter" / "adapter_model.safetensors")
    fingerprint.cache_clear()  # the folders' names come again
    base, tower = (known_model(str(tmp_path / name)) for name in ("base", "tower"))
    AdapterRecord(conversation="v1", base=base, vision_tower=tower).save(tmp_path / "adapter")
    return tmp_path


def copy(place, name="other", of="base", **fields):
    folder = shutil.copytree(place / of, place / name)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_base_is_the_same_where_it_has_moved_to(place, capsys):
    shutil.move(place / "base", place / "elsewhere")
    check_base(place / "adapter", str(place / "elsewhere"))
    assert capsys.readouterr().out == ""


def test_another_base_is_refused_with_what_differs(place):
    other = copy(place, rope_theta=7)
    save_file({"up_proj.weight": 2 * torch.eye(4)}, other / "model.safetensors")
    message = message_of(check_base, place / "adapter", str(other))
    assert str(other) in message and f"({place / 'base'})" in message and "its weights differ" in message
    assert "--model-base" in message and "--allow-other-base" in message


def test_base_that_differs_in_its_tokenizer_only_is_told_so(place):
    (place / "base" / "tokenizer.model").write_bytes(b"words")
    fingerprint.cache_clear()
    AdapterRecord(base=known_model(str(place / "base"))).save(place / "adapter")
    other = copy(place)
    (other / "tokenizer.model").write_bytes(b"other words")
    message = message_of(check_base, place / "adapter", str(other))
    assert "its tokenizer differs" in message and "weights" not in message


def test_another_base_is_taken_by_who_means_it_and_said_once(place, capsys):
    other = copy(place, vocab_size=7)
    check_base(place / "adapter", str(other), allow_other=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and "its vocab_size is 7 and not 10" in line


@pytest.mark.parametrize("has_record", [True, False])
def test_base_of_another_shape_is_refused_whatever_is_allowed(place, has_record):
    other = copy(place, num_hidden_layers=3)
    if not has_record:
        (place / "adapter" / RECORD).unlink()
    message = message_of(check_base, place / "adapter", str(other), True)
    assert "num_hidden_layers=2" in message and str(other) in message and "--model-base" in message


def test_adapter_without_a_record_takes_what_fits(place, capsys):
    (place / "adapter" / RECORD).unlink()
    check_base(place / "adapter", str(copy(place, vocab_size=7)))
    check_base(place / "adapter", str(place / "gone"))
    check_tower(place / "adapter", str(copy(place, "tower2", of="tower", patch_size=7)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has_record", [True, False])
def test_base_that_holds_the_adapter_already_is_refused(place, has_record):
    merged = copy(place, "merged")
    if not has_record:
        (place / "adapter" / RECORD).unlink()
    record_of_merged(place / "adapter", str(place / "base")).save(merged)
    message = message_of(check_base, place / "adapter", str(merged))
    assert f"{merged} holds {place / 'adapter'} already" in message and "load" in message
    check_base(place / "adapter", str(merged), allow_other=True)


def test_adapter_that_was_trained_on_a_merged_checkpoint_goes_there(place, capsys):
    merged = copy(place, "merged")
    record_of_merged(place / "adapter", str(place / "base")).save(merged)
    second = copy(place, "second", of="adapter")
    save_file({"up_proj.mixlora_A": torch.zeros(2, 4)}, second / "adapter_model.safetensors")
    AdapterRecord(base=known_model(str(merged))).save(second)
    check_base(second, str(merged))
    assert capsys.readouterr().out == ""
    assert [each.name for each in record_of_merged(second, str(merged)).merged] == [
        str(place / "adapter"),
        str(second),
    ]


def test_another_tower_is_refused_with_its_flag(place):
    other = copy(place, "tower2", of="tower", patch_size=7)
    message = message_of(check_tower, place / "adapter", str(other))
    assert "its patch_size is 7 and not 14" in message and "--vision-tower" in message
    check_tower(place / "adapter", str(place / "tower"))
