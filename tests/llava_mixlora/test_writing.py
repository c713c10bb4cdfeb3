"""Results that are whole or absent."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from llava_mixlora.writing import save_tensors, whole_file, write_whole, writing

from ..tiny import message_of, no_room


def python(file):
    file.write_text("x" * 80_000)


def safetensors(file):
    save_file({"x": torch.zeros(20_000)}, file)


def of_torch(file):
    torch.save(torch.zeros(20_000), file)


@pytest.mark.parametrize("write", [python, safetensors, of_torch])
def test_failed_write_is_one_line_and_leaves_what_was_there(tmp_path, write):
    (tmp_path / "result").write_text("earlier")

    def replace():
        with no_room(50_000), whole_file(tmp_path / "result") as file:
            write(file)

    said = message_of(replace)
    assert f"{tmp_path / 'result'} could not be written (" in said and "choose another --output" in said
    assert [file.name for file in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "earlier"


def test_full_disk_is_called_so():
    def fill():
        with writing("/place", "make room"), open("/dev/full", "w") as file:
            file.write("x")

    assert message_of(fill) == "/place could not be written (the disk is full); make room"


def test_other_errors_stay_what_they_are_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "result") as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_whole(tmp_path):
    write_whole(tmp_path / "result", "text")
    assert (tmp_path / "result").read_text() == "text"
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize("place", ["result", ".unfinished-result"])
def test_nothing_is_written_through_a_link(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "folder" / place).symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "folder" / "result", "text")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "folder" / "result").read_text() == "text"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    usual = os.umask(mask)
    try:
        write_whole(tmp_path / "text", "text")
        save_tensors({"x": torch.zeros(2)}, tmp_path / "tensors")
        assert os.umask(mask) == mask
    finally:
        os.umask(usual)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "tensors")] == [mode, mode]
