"""What users give is read, or named in one line."""

import os
from pathlib import Path

import pytest

from llava_mixlora.inputs import check_writable, expanded, read_json
from llava_mixlora.limits import VARIABLE

from ..tiny import message_of

pytestmark = pytest.mark.one_stack


def test_home_that_nobody_has_is_a_folder_that_is_not_there():
    assert expanded("~/x") == Path.home() / "x" and not expanded("~nobody-is-called-so/x").exists()


def test_output_folder_in_use_is_kept(tmp_path):
    (tmp_path / "kept").write_text("kept")
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_read_only_place_is_named():
    assert "cannot be written" in message_of(check_writable, "/proc/llava-mixlora")


def written(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    return tmp_path / "file.json"


def test_object_is_read(tmp_path):
    assert read_json(written(tmp_path, '{"a": [1, 2.5, null], "b": {"a": "c"}}')) == {
        "a": [1, 2.5, None],
        "b": {"a": "c"},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"r": 4, "lora_alpha": 8, "r": 4}', "names 'r' twice"),
        ('{"a": {"deep": 1, "deep": 2}}', "names 'deep' twice"),
        ('{"lora_alpha": NaN}', "holds NaN"),
        ('{"lora_alpha": [-Infinity]}', "holds -Infinity"),
        ('{"lora_alpha": 1e999}', "too large for a number"),
        ('{"r": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64 deep"),
        ("[" * 200_000, "nested more than 64 deep"),
        ('{"a": ' * 100_000, "nested more than 64 deep"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": 1', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_no_plain_object_is_refused_in_one_line(tmp_path, text, said):
    file = written(tmp_path, text)
    message = message_of(read_json, file)
    assert said in message and message.startswith(str(file))


def test_what_trainer_logs_may_hold_what_is_no_number(tmp_path):
    assert str(read_json(written(tmp_path, '{"loss": NaN}'), only_numbers=False)) == "{'loss': nan}"


def test_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "json_bytes=10")
    assert "has 13 bytes" in message_of(read_json, written(tmp_path, '{"a": "bcde"}'))


def test_pipe_and_device_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        assert "is no regular file" in message_of(read_json, tmp_path / name)
