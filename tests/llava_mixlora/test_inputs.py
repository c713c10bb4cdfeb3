"""What users give is read, or named in one line."""

import pytest

from llava_mixlora.inputs import check_writable

from ..tiny import message_of

pytestmark = pytest.mark.one_stack


def test_output_folder_in_use_is_kept(tmp_path):
    (tmp_path / "kept").write_text("kept")
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_read_only_place_is_named():
    assert "cannot be written" in message_of(check_writable, "/proc/llava-mixlora")
