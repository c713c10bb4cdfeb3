"""One run for each output folder."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from llava_mixlora import folder_lock
from llava_mixlora.folder_lock import NAME, locked

from ..tiny import message_of

HOLD = """
import os, sys, time
from llava_mixlora.folder_lock import locked
with locked(sys.argv[1], "--output"):
    if os.fork() == 0:  # as a DataLoader's worker, which outlives its run for a moment
        print("held", flush=True)
        time.sleep(60)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder, with a child."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def enter(folder):
    with locked(folder, "--output"):
        return (folder / NAME).read_text()


def test_second_run_is_told_whose_the_folder_is(tmp_path, holder):
    said = message_of(enter, tmp_path)
    assert f"--output {tmp_path} is in use" in said
    assert f"process {holder.pid} on {socket.gethostname()}, started 2" in said


def test_lock_of_a_dead_run_is_taken_over_though_its_child_lives(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert f"process {os.getpid()} " in enter(tmp_path)


def test_nothing_is_left_in_the_folder(tmp_path):
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "--output"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_folder_is_free_again_afterwards_and_locked_until_then(tmp_path):
    with locked(tmp_path, "--output"):
        message_of(enter, tmp_path)
    enter(tmp_path)


@pytest.mark.parametrize("name", folder_lock.RANKS)
def test_further_processes_of_a_run_take_no_lock(tmp_path, monkeypatch, name):
    for other in folder_lock.RANKS:
        monkeypatch.delenv(other, raising=False)
    with locked(tmp_path, "--output"):
        monkeypatch.setenv(name, "1")
        with locked(tmp_path, "--output"):
            pass
        assert (tmp_path / NAME).exists()
        monkeypatch.setenv(name, "0")
        message_of(enter, tmp_path)


def test_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock = fcntl.flock

    def slow(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / NAME).unlink()  # by the run that had it, between our opening and our locking
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    assert f"process {os.getpid()} " in enter(tmp_path)


def test_where_nothing_can_be_locked_a_note_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, "--output"):
        assert list(tmp_path.iterdir()) == []
    assert "would not be noticed" in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert "choose another --output" in message_of(enter, tmp_path / "file" / "folder")
