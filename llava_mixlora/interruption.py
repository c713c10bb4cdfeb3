"""Ctrl-C: one line and the status that shells know, from the first import to the last.

Imported before anything that takes time, so it imports nothing but what Python has loaded already.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGINT
PACKAGE = __name__.partition(".")[0]
PROGRAM = "llava-mixlora"


def is_program(orig_argv: list[str] | None = None) -> bool:
    """Whether this process runs our command line, rather than a program that imports the package.

    While Python still looks for the module of `python -m`, only the words that it was started with tell.
    """
    words = sys.orig_argv if orig_argv is None else orig_argv
    as_module = [f"-m{PACKAGE}" in words, *(pair == ("-m", PACKAGE) for pair in zip(words, words[1:]))]
    return any(as_module) or any(os.path.basename(word) == PROGRAM for word in words[:3])


def end_at_once() -> None:
    """From now on Ctrl-C says so and ends the process, as nothing has been written yet.

    An exception would not do: imports call back from C, where it is printed and forgotten.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raising() -> Iterator[None]:
    """While a command works, Ctrl-C raises `KeyboardInterrupt`, so that what is half written is removed.

    Nothing changes where [`end_at_once`] was not called: the signal is somebody else's.
    """
    if signal.getsignal(signal.SIGINT) is not _end or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def say(kept: str = "") -> None:
    """Print the line, in the first of several processes; `kept`: what remains of the work."""
    if os.environ.get("RANK", "0") == "0":
        line = f"{PROGRAM}: interrupted{': ' if kept else ''}{kept}\n"
        os.write(2, line.encode())  # not through sys.stderr, which the signal may have caught at work


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of several that come at once, the first counts
    say()
    os._exit(STATUS)
