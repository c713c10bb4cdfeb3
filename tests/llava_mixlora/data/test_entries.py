"""A data file is read entry by entry, whatever its form, or named in one line."""

import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_mixlora.data import entries as module
from llava_mixlora.data.entries import entries
from llava_mixlora.limits import VARIABLE

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

FIRST, SECOND = {"id": 1, "conversations": []}, {"id": "zwei é 😀", "conversations": [{"value": "a]}\n"}]}
BOTH = [FIRST, SECOND]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(BOTH),
        json.dumps(BOTH, ensure_ascii=False),
        json.dumps(BOTH, indent=1),
        f" \n{json.dumps(BOTH)}\n ",
        "\n".join(map(json.dumps, BOTH)),
        "\n\n".join(map(json.dumps, BOTH)) + "\n",
        "\r\n".join(map(json.dumps, BOTH)),
        "\n".join(json.dumps(entry, indent=2) for entry in BOTH),
    ],
    ids=["list", "not ascii", "indented", "white space", "lines", "empty lines", "Windows", "indented lines"],
)
def test_lists_and_lines_give_the_same_entries(tmp_path, text, encoding):
    (tmp_path / "data").write_bytes(text.encode(encoding))
    assert list(entries(tmp_path / "data")) == BOTH


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)), min_size=2))
def test_entries_do_not_depend_on_how_much_is_read_at_once(tmp_path_factory, found):
    file = tmp_path_factory.mktemp("data") / "data.json"
    file.write_text(json.dumps(found))
    block = module.BLOCK
    try:
        for module.BLOCK in (1, 7):
            assert list(entries(file)) == found
    finally:
        module.BLOCK = block


def test_one_line_is_one_entry(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(FIRST))
    assert list(entries(tmp_path / "data.jsonl")) == [FIRST]


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "holds no entries"),
        (" \n", "holds no entries"),
        ("[]", "holds no entries"),
        ("{}", "got one JSON object"),
        ('{"0": {"id": 1}, "1": {"id": 2}}', "got one JSON object with the keys '0', '1'"),
        ("3", "got one int"),
        ('"text"', "got one str"),
        ("version: 1", "not valid JSON at its beginning"),
        ('[{"id": 1}, {"conversations": [', "not valid JSON at entry 1"),
        ('[{"id": 1}', "not valid JSON at entry 1"),
        ('[{"id": 1},]', "not valid JSON at entry 1"),
        ('[{"id": 1} {"id": 2}]', "not valid JSON at entry 1"),
        ('[{"id": 1}]]', "behind the end of the list"),
        ('{"id": 1}\n{"id": \n', "not valid JSON at entry 1 (line 3"),
        ('[{"id": 1},\n{"id": 2},\n{"id": 2 "text"}]', "not valid JSON at entry 2 (line 3"),
    ],
)
def test_broken_files_are_described(tmp_path, content, named):
    (tmp_path / "data.json").write_text(content)
    message = message_of(lambda: list(entries(tmp_path / "data.json")))
    assert named in message and str(tmp_path / "data.json") in message and "JSON list of conversations" in message


def test_numbers_of_thousands_of_digits_are_described(tmp_path):
    (tmp_path / "data.json").write_text(f'[{{"id": 1}}, {{"id": {"9" * 5000}}}]')
    assert "entry 1 cannot be read" in message_of(lambda: list(entries(tmp_path / "data.json")))


def test_entry_that_never_ends_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"json_bytes={module.BLOCK}")
    (tmp_path / "data.json").write_text('[{"id": 1}, "' + "x" * (8 * module.BLOCK))
    message = message_of(lambda: list(entries(tmp_path / "data.json")))
    assert "entry 1 (line 1: an entry of more than 1,048,576 letters (--input-limit json_bytes=" in message


def test_what_is_wrong_is_told_without_reading_to_the_end(tmp_path):
    (tmp_path / "data.json").write_text("[nothing" + " " * (4 * module.BLOCK))
    reader = entries(tmp_path / "data.json")
    assert "not valid JSON" in message_of(lambda: next(reader))


def test_entries_before_the_broken_one_are_given(tmp_path):
    (tmp_path / "data.json").write_text('[{"id": 1}, {"id": 2}, {"id"')
    assert list(itertools.islice(entries(tmp_path / "data.json"), 2)) == [{"id": 1}, {"id": 2}]


def test_files_that_are_not_text_are_described(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\x1f\x8b\x08\x00binary")
    assert "not text in UTF-8 from its beginning" in message_of(lambda: list(entries(tmp_path / "data.json")))
    (tmp_path / "data.json").write_bytes(b'{"id": 1}\n' * module.BLOCK + b"\xff")
    assert "not text in UTF-8 behind entry " in message_of(lambda: list(entries(tmp_path / "data.json")))


def test_folders_and_missing_files_are_described(tmp_path):
    assert "cannot be read" in message_of(lambda: list(entries(tmp_path)))
    assert "no such file" in message_of(lambda: list(entries(tmp_path / "gone.json")))


def test_pipe_and_device_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        assert f"{name} is no regular file" in message_of(list, entries(tmp_path / name))


def test_entry_that_is_nested_too_deep_is_named(tmp_path):
    (tmp_path / "deep.json").write_text(json.dumps([FIRST])[:-1] + ', {"conversations": ' + "[" * 100_000)
    assert "nested too deep" in message_of(list, entries(tmp_path / "deep.json"))
