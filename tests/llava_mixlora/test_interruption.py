"""Ctrl-C: one line on standard error and status 130, at whatever moment it comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_mixlora import interruption
from llava_mixlora.cli import COMMANDS, main

from ..end_to_end.training import environment, program

MODULE = [sys.executable, "-m", "llava_mixlora"]
SCRIPT = "import sys, time\nprint('working', flush=True)\ntime.sleep(60)\n"


def start(*words, **options):
    """A process that takes Ctrl-C, which shells turn off for what they start in the background."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(words, env=environment(), preexec_fn=take_interrupts, **pipes, **options)


def take_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_torch(process):
    """Until it has begun to import torch, which takes seconds more."""
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(20_000):
        if "libtorch" in maps.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("it never came to that")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[*MODULE, "patches"], [program("llava-mixlora"), "inspect", "x"]], ids=["-m", "script"]
)
def test_interrupted_import_is_one_line(words):
    process = start(*words)
    wait_for_torch(process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors) == (130, "", "llava-mixlora: interrupted\n")


@pytest.mark.slow
def test_interrupted_script_ends_as_python_ends_it(tmp_path):
    body = SCRIPT.replace("import sys, time\n", "").replace("\n", "\n  ").rstrip()
    (tmp_path / "script.py").write_text(f"import sys, time\ntry:\n  {body}\nfinally:\n  print('tidied')\n")
    process = start(*MODULE, "run", str(tmp_path / "script.py"))
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "tidied\n"
    assert errors.splitlines()[-1] == "llava-mixlora: interrupted" and "Traceback" not in errors


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "run"])
def test_every_command_ends_in_one_line_when_it_is_interrupted(command, monkeypatch, capfd):
    def interrupted(arguments):
        raise KeyboardInterrupt

    def describe(parser):
        parser.set_defaults(command=interrupted)

    place = COMMANDS[command][0]
    module, _, function = place.partition(":")
    monkeypatch.setattr(f"llava_mixlora.{module}.{function}", describe)
    assert main([command]) == 130
    assert capfd.readouterr().err == "llava-mixlora: interrupted\n"


def test_further_processes_of_a_run_say_nothing(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    interruption.say()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "words, expected",
    [
        (["python", "-m", "llava_mixlora", "doctor"], True),
        (["python", "-u", "-m", "llava_mixlora", "--local_rank=0"], True),
        (["python", "-mllava_mixlora"], True),
        (["/usr/bin/python", "/place/bin/llava-mixlora", "run"], True),
        (["python", "-m", "pytest", "llava_mixlora"], False),
        (["python", "train.py", "--output", "out", "llava-mixlora"], False),
        (["jupyter"], False),
    ],
)
def test_signals_of_other_programs_stay_theirs(words, expected):
    assert interruption.is_program(words) is expected


def test_importing_the_package_changes_no_signal():
    code = "import signal, llava_mixlora; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=take_interrupts, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_ignored_signal_stays_ignored():
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption.end_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
