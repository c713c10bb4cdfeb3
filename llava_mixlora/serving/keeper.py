"""Clears up after a server, however that ends: a small process that outlives it, and nothing else.

It reads lines `keep PATH`, `drop PATH`, `keep-group ID`, `drop-group ID`; when they end, so has the server, and what is
kept is removed: folders with all that is in them, groups of processes.
"""

import contextlib
import os
import shutil
import signal
import sys


def clear(lines) -> None:
    """Read to the end, then clear up."""
    folders, groups = set(), set()
    kept = {"": folders, "-group": groups}
    for line in lines:
        verb, _, value = line.rstrip("\n").partition(" ")
        what, _, of = verb.partition("-")
        of_kind = kept["-group" if of else ""]
        (of_kind.add if what == "keep" else of_kind.discard)(value)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(int(group), signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    clear(sys.stdin)
