"""Checkpoints that are whole or absent."""

import json
import os
import shutil
import subprocess

import pytest

from llava_mixlora import MixLoraError
from llava_mixlora.training import checkpoint


def write(output, name, content=b"weights"):
    folder = checkpoint.unfinished(output) / name
    (folder / "global_step").mkdir(parents=True)
    for needed in checkpoint.NEEDED:
        (folder / needed).write_bytes(content[1:])
    (folder / "optimizer.pt").write_bytes(content)
    (folder / "global_step" / "rank 0.pt").write_bytes(content[::-1])
    return folder


@pytest.fixture
def output(tmp_path):
    """A folder with the whole checkpoints 2 and 10."""
    for name in ("checkpoint-2", "checkpoint-10"):
        write(tmp_path, name)
        checkpoint.publish(tmp_path, name)
    return tmp_path


def message(call, *arguments):
    with pytest.raises(MixLoraError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_checkpoints_come_newest_first_and_nothing_else_is_one(output):
    (output / "checkpoint-tmp").mkdir()
    (output / "checkpoint-7.bak").mkdir()
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-10", "checkpoint-2"]
    assert checkpoint.checkpoints(output / "missing") == []


def test_published_checkpoint_is_whole_and_nothing_is_left_beside_it(output):
    for folder in checkpoint.checkpoints(output):
        checkpoint.verify(folder)
    assert not checkpoint.unfinished(output).exists()


def test_sums_are_those_of_sha256sum(output):
    command = ["sha256sum", "--check", checkpoint.CHECKSUMS]
    said = subprocess.run(command, cwd=output / "checkpoint-2", capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count(": OK") == 2 + len(checkpoint.NEEDED)


def test_published_checkpoint_replaces_one_of_its_name(output):
    write(output, "checkpoint-2", b"other weights")
    folder = checkpoint.publish(output, "checkpoint-2")
    assert (folder / "optimizer.pt").read_bytes() == b"other weights"
    checkpoint.verify(folder)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["optimizer.pt", "global_step/rank 0.pt"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(output, capsys, harm, name):
    file = output / "checkpoint-10" / name
    content = file.read_bytes()
    {
        "flip": lambda: file.write_bytes(bytes([content[0] ^ 1]) + content[1:]),
        "cut": lambda: file.write_bytes(content[:-1]),
        "remove": file.unlink,
    }[harm]()
    assert str(file) in message(checkpoint.verify, output / "checkpoint-10")
    assert checkpoint.newest_whole(output).name == "checkpoint-2"
    assert str(file) in capsys.readouterr().out


def test_no_whole_checkpoint_is_an_error_that_names_the_damaged(output):
    for folder in checkpoint.checkpoints(output):
        (folder / "optimizer.pt").unlink()
    said = message(checkpoint.newest_whole, output)
    assert "checkpoint-10, checkpoint-2" in said and "--output_dir" in said


def test_checkpoint_that_lacks_the_projector_is_not_whole(output):
    shutil.rmtree(output / "checkpoint-10")
    (output / "checkpoint-2" / checkpoint.CHECKSUMS).unlink()
    (output / "checkpoint-2" / "non_lora_trainables.bin").unlink()
    assert "non_lora_trainables.bin is missing" in message(checkpoint.verify, output / "checkpoint-2")


def test_failed_write_is_named_and_leaves_nothing_unfinished(output):
    folder = write(output, "checkpoint-12")
    said = message(fail_while_saving, output / "checkpoint-12", OSError(5, "Input/output error"))
    assert "checkpoint-12" in said and "Input/output error" in said
    assert not folder.exists()


def test_other_errors_stay_what_they_are(output):
    with pytest.raises(ZeroDivisionError):
        fail_while_saving(output / "checkpoint-12", ZeroDivisionError())


def fail_while_saving(folder, error):
    with checkpoint.saving(folder):
        raise error


@pytest.mark.parametrize(("keep", "left"), [(1, ["checkpoint-10"]), (None, ["checkpoint-10", "checkpoint-2"])])
def test_oldest_checkpoints_are_removed(output, keep, left):
    checkpoint.remove_oldest(output, keep)
    assert [folder.name for folder in checkpoint.checkpoints(output)] == left


def change_list(folder, change):
    file = folder / checkpoint.CHECKSUMS
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


SUM = 64 * "0"


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 2, [10, 2]), (2, 2, [10, 2]), (3, 2, [10, 7, 2]), (2, 10, [10, 7]), (1, 10, [10]), (None, 2, [10, 7, 4, 2])],
)
def test_best_checkpoint_is_never_removed_and_the_newest_stays_too(output, keep, best, left):
    for number in (4, 7):
        (output / f"checkpoint-{number}").mkdir()
    checkpoint.remove_oldest(output, keep, output / f"checkpoint-{best}")
    assert [folder.name for folder in checkpoint.checkpoints(output)] == [f"checkpoint-{number}" for number in left]


@pytest.mark.parametrize(
    "line",
    [
        f"{SUM}  ../../other",
        f"{SUM}  /etc/hostname",
        f"{SUM}  global_step/../../../other",
        f"{SUM}  ./optimizer.pt",
        "no sum at all",
        f"{SUM}  ",
        "",
    ],
)
def test_list_that_names_what_is_no_file_inside_is_damaged(output, line):
    folder = output / "checkpoint-10"
    change_list(folder, lambda lines: [line, *lines])
    said = message(checkpoint.verify, folder)
    assert f"{folder / checkpoint.CHECKSUMS} is damaged: its line 1" in said
    assert checkpoint.newest_whole(output).name == "checkpoint-2"


@pytest.mark.parametrize("name", [*checkpoint.NEEDED, "optimizer.pt"])
def test_list_without_a_needed_file_is_damaged(output, name):
    folder = output / "checkpoint-10"
    change_list(folder, lambda lines: [line for line in lines if not line.endswith(f"  {name}")])
    assert f"does not list {name}" in message(checkpoint.verify, folder)
    if name != "optimizer.pt":
        (folder / name).unlink()
        assert f"does not list {name}" in message(checkpoint.verify, folder)


def test_empty_list_is_damaged(output):
    change_list(output / "checkpoint-10", lambda lines: [])
    assert "does not list" in message(checkpoint.verify, output / "checkpoint-10")


def test_state_that_the_run_had_is_needed_when_file_and_line_are_gone(tmp_path):
    folder = write(tmp_path, "checkpoint-3")
    (folder / checkpoint.RUN).write_text(json.dumps({"files": ["optimizer.pt"]}))
    folder = checkpoint.publish(tmp_path, "checkpoint-3")
    checkpoint.verify(folder)
    (folder / "optimizer.pt").unlink()
    change_list(folder, lambda lines: [line for line in lines if not line.endswith("optimizer.pt")])
    assert "does not list optimizer.pt" in message(checkpoint.verify, folder)
    (folder / checkpoint.CHECKSUMS).unlink()
    assert "checksums.sha256 is missing" in message(checkpoint.verify, folder)


@pytest.mark.parametrize("kind", ["link", "link of its folder", "pipe", "folder"])
def test_what_is_no_regular_file_inside_is_damaged_and_does_not_hang(output, tmp_path_factory, kind):
    folder, elsewhere = output / "checkpoint-10", tmp_path_factory.mktemp("elsewhere")
    file = folder / "optimizer.pt"
    if kind == "link of its folder":
        file = folder / "global_step"
    file.rename(elsewhere / "same")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(elsewhere / "same")
    said = message(checkpoint.verify, folder)
    assert str(file) in said and ("outside of its folder" if "link" in kind else "is no regular file") in said


def test_list_that_is_a_pipe_or_a_dangling_link_is_damaged(output, tmp_path):
    for make in (os.mkfifo, lambda place: place.symlink_to(tmp_path / "gone")):
        (output / "checkpoint-10" / checkpoint.CHECKSUMS).unlink()
        make(output / "checkpoint-10" / checkpoint.CHECKSUMS)
        said = message(checkpoint.verify, output / "checkpoint-10")
        assert "checksums.sha256 is no regular file" in said or "checksums.sha256 cannot be read" in said


def test_unfinished_checkpoint_is_not_written_through_a_link(output, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    checkpoint.unfinished(output).symlink_to(elsewhere)
    checkpoint.discard_unfinished(output)
    write(output, "checkpoint-12")
    assert not checkpoint.unfinished(output).is_symlink() and not any(elsewhere.iterdir())
