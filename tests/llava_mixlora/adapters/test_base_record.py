"""An adapter knows its base again."""

import json
import shutil

import pytest

from llava_mixlora.adapters.base_record import BASE_RECORD, check_base, record_base

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 10}


@pytest.fixture
def place(tmp_path):
    """A base, and an adapter that was trained on it and has more tokens."""
    for name, config in {"base": CONFIG, "adapter": {**CONFIG, "vocab_size": 12}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    record_base(tmp_path / "adapter", str(tmp_path / "base"))
    return tmp_path


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_base_is_the_same_where_it_has_moved_to(place, capsys):
    shutil.move(place / "base", place / "elsewhere")
    check_base(place / "adapter", str(place / "elsewhere"))
    assert capsys.readouterr().out == ""


def test_another_base_is_one_line(place, capsys):
    shutil.copytree(place / "base", place / "other")
    change(place / "other", rope_theta=7)
    check_base(place / "adapter", str(place / "other"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and str(place / "other") in line and f"({place / 'base'})" in line


def test_base_of_another_shape_is_refused(place):
    shutil.copytree(place / "base", place / "other")
    change(place / "other", num_hidden_layers=3)
    message = message_of(check_base, place / "adapter", str(place / "other"))
    assert "num_hidden_layers=2" in message and str(place / "other") in message and "--model-base" in message
    (place / "adapter" / BASE_RECORD).unlink()  # of a version that recorded nothing
    message_of(check_base, place / "adapter", str(place / "other"))


def test_base_that_was_not_recorded_is_taken(place, capsys):
    (place / "adapter" / BASE_RECORD).unlink()
    check_base(place / "adapter", str(place / "base"))
    check_base(place / "adapter", str(place / "gone"))
    assert capsys.readouterr().out == ""


def test_base_on_the_hub_is_recorded_with_its_commit(place):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = place / "cache" / "models--owner--llava"
    shutil.copytree(place / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    record_base(place / "adapter", "owner/llava", str(place / "cache"))
    record = json.loads((place / "adapter" / BASE_RECORD).read_text())
    assert record["name_or_path"] == "owner/llava" and record["revision"] == commit
    check_base(place / "adapter", str(place / "base"))
