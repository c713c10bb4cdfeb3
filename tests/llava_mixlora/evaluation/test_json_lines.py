"""Lines that were written answer by answer are read as they were written, or what is wrong with the file is told."""

import os

import pytest

from llava_mixlora.evaluation.json_lines import append_lines, read_lines

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

KINDS = {"question_id": str, "text": str}
FIRST = {"question_id": "1", "text": "red"}


def test_lines_are_read_as_they_were_written_but_for_a_torn_one(tmp_path):
    file = tmp_path / "answers.jsonl"
    assert read_lines(file, KINDS) == []
    append_lines(file, [FIRST, {**FIRST, "question_id": "2"}])
    file.write_text(file.read_text() + '{"question_id": "3')
    assert [line["question_id"] for line in read_lines(file, KINDS)] == ["1", "2"]


def test_folder_and_line_without_an_end_are_no_answers(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in message_of(read_lines, tmp_path / "folder", KINDS)
    append_lines(tmp_path / "endless", [FIRST])
    os.truncate(tmp_path / "endless", 1 << 40)
    assert "line 2: more than" in message_of(read_lines, tmp_path / "endless", KINDS)


@pytest.mark.parametrize("line", ["3", '"text"', "{}", '{"question_id": "1"}', '{"question_id": "1", "text": [1]}'])
def test_line_of_another_form_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    append_lines(file, [FIRST])
    file.write_text(file.read_text() + line + "\n")
    assert "(line 2 has not question_id and text as they were written)" in message_of(read_lines, file, KINDS)
