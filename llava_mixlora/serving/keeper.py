"""Clears up after a server, however that ends: a small process that outlives it, and nothing else.

It reads lines `keep PATH`, `drop PATH`, `keep-group ID`, `drop-group ID`; when they end, so has the server, and what is
kept is removed: folders with all that is in them, groups of processes.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE = 10.0
"""Seconds that a group has to end by itself."""


def end_group(group) -> None:
    """End a group of processes, those first that hear it: what they share in memory goes with the one that removes it.

    That one, Python's resource tracker, ends when all others have; a signal to all would leave hundreds of megabytes.
    """
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            os.killpg(group, 0)  # fails when nobody is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def clear(lines) -> None:
    """Read to the end, then clear up."""
    folders, groups = set(), set()
    kept = {"": folders, "-group": groups}
    for line in lines:
        verb, _, value = line.rstrip("\n").partition(" ")
        what, _, of = verb.partition("-")
        of_kind = kept["-group" if of else ""]
        (of_kind.add if what == "keep" else of_kind.discard)(value)
    for group in map(int, groups):
        end_group(group)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    clear(sys.stdin)
