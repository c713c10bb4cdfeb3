"""Commands whose disk is full, or whose output cannot be written: one line, status 1, nothing half written."""

import json
import os
import resource
import subprocess
import sys

import pytest

from llava_mixlora.cli import main

from ..tiny import draw_pictures, write_adapter

ROOM = 3_000  # bytes: less than any result takes, and more than the data
TASKS = ("colour", "shape")


@pytest.fixture(scope="module")
def place(llava_folder, tmp_path_factory):
    """An adapter, and data with two tasks, which are questions too."""
    place = tmp_path_factory.mktemp("place")
    write_adapter(llava_folder, place / "llava-mixlora")
    draw_pictures(place, 12)
    samples = []
    for number in range(12):
        turns = [("human", f"<image>\nwhat {TASKS[number % 2]} is the circle?"), ("gpt", "red")]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        sample = {"id": str(number), "image": f"{number}.png", "task": TASKS[number % 2]}
        samples.append({**sample, "conversations": conversation})
    (place / "data.json").write_text(json.dumps(samples))
    return place


def words(command, place, output):
    adapter, data = str(place / "llava-mixlora"), str(place / "data.json")
    on_data = ["--data", data, "--image-folder", str(place), "--version", "llava_v1", "--output", str(output)]
    return {
        "merge": ["merge", "--model-path", adapter, "--save-model-path", str(output), "--force"],
        "export-lora": ["export-lora", "--model-path", adapter, "--save-model-path", str(output), "--force"],
        "eval": ["eval", "--model-path", adapter, "--questions", data, "--output", str(output), "--max-new-tokens=8"],
        "plot": ["plot", adapter, "--output", str(output / "usage.png")],
        "plot --data": ["plot", adapter, *on_data, "--samples", "6"],
        "interference": ["interference", adapter, *on_data, "--samples", "6", "--batch-size", "1"],
    }[command]


COMMANDS = ("merge", "export-lora", "eval", "plot", "plot --data", "interference")


def line_of(errors):
    (line,) = [line for line in errors.splitlines() if line.startswith("llava-mixlora: error: ")]
    return line


def without_room(room, given):
    """The one line on standard error of a process that may write no file of more than `room` bytes."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = subprocess.run(
        [sys.executable, "-B", "-m", "llava_mixlora", *given], preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return line_of(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk_is_one_line_and_leaves_nothing_half_written(place, tmp_path, command):
    output = tmp_path / "out"
    line = without_room(ROOM if command != "eval" else ROOM // 3, words(command, place, output))
    assert "could not be written (" in line and "File too large" in line and str(output) in line
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(file.name.startswith(".") for file in files)
    assert {file.name for file in files if file.stat().st_size} <= {"run.json", "routes.json"}
    assert all(json.loads(file.read_text()) for file in files if file.stat().st_size)
    assert not any(file.is_dir() for file in tmp_path.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "interference"])
def test_full_disk_leaves_earlier_results_as_they_were(place, tmp_path, command):
    output = tmp_path / "out"
    assert main(words(command, place, output)) == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    without_room(100, words(command, place, output))
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_cannot_be_written_is_one_line(place, tmp_path, capsys, command):
    (tmp_path / "file").write_text("in the way")
    assert main(words(command, place, tmp_path / "file" / "out")) == 1
    assert str(tmp_path / "file" / "out") in line_of(capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_interrupted_merge_leaves_nothing(place, tmp_path, monkeypatch, capfd):
    from llava_mixlora.merging import merge

    def interrupted(*arguments):
        _, _, _, folder, _ = arguments
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "write_merged", interrupted)
    assert main(words("merge", place, tmp_path / "out")) == 130
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err.splitlines()[-1] == "llava-mixlora: interrupted"


def test_second_merge_into_a_folder_is_refused_and_harms_nothing(place, tmp_path, capsys):
    from llava_mixlora.adapters.model_folders import new_folder

    with new_folder("--save-model-path", tmp_path / "out") as folder:
        (folder / "half").write_text("of the first")
        assert main(words("merge", place, tmp_path / "out")) == 1
        assert "is in use by another run" in line_of(capsys.readouterr().err) and (folder / "half").is_file()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["half"]


def test_second_evaluation_in_a_folder_is_refused_and_harms_nothing(place, tmp_path, capsys):
    from llava_mixlora.folder_lock import locked

    with locked(tmp_path, "--output"):
        (tmp_path / "answers.part-0.jsonl").write_text("of the first")
        assert main(words("eval", place, tmp_path)) == 1
        assert "--output" in (line := line_of(capsys.readouterr().err)) and f"process {os.getpid()}" in line
        assert (tmp_path / "answers.part-0.jsonl").read_text() == "of the first"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "patches"])
def test_full_standard_output_is_one_line(place, command):
    given = [command, str(place / "llava-mixlora")][: 2 if command == "inspect" else 1]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llava_mixlora", *given], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llava-mixlora: error: the standard output")
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
