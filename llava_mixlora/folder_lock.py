"""A lock on an output folder: two runs that write into one would undo each other's work.

It is a file that a run holds with `flock`, so it ends with the process, however that ends; the file tells whose it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .errors import MixLoraError

NAME = ".llava-mixlora.lock"
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers tell a process its number among those of its run, as `accelerate` looks for it."""
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(folder: str | Path, flag: str) -> Iterator[None]:
    """Hold the lock of `folder`, given as `flag`, while the body runs; of a run's processes, the first one does.

    Raises:
        MixLoraError: another run holds it; the line names its process, machine and start.
    """
    with lock_file(Path(folder) / NAME, folder, flag):
        yield


@contextmanager
def lock_file(file: Path, folder: str | Path, flag: str) -> Iterator[None]:
    """As [`locked`], with a file of the caller's choice, such as one beside a folder that is only being made."""
    if first_of_its_run():
        descriptor = _take(file, folder, flag)
        try:
            yield
        finally:
            if descriptor is not None:
                _held.discard(descriptor)
                file.unlink(missing_ok=True)  # while it is held: see _take
                os.close(descriptor)
    else:
        yield


def first_of_its_run() -> bool:
    """Whether a launcher calls this process number 0, or there is none."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def _take(file: Path, folder: str | Path, flag: str) -> int | None:
    """The lock's descriptor; None where the file system knows no locks."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise MixLoraError(f"{folder}: cannot be written ({error.strerror}); choose another {flag}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").split("\n")[0]
            os.close(descriptor)
            if error.errno in HELD:
                raise MixLoraError(
                    f"{flag} {folder} is in use by another run ({holder or 'which has just begun'}); wait until it has "
                    f"ended, end it, or choose another {flag}"
                ) from None
            file.unlink(missing_ok=True)
            print(
                f"note: {folder} lies where files cannot be locked ({error.strerror}): a second run in it would not be "
                "noticed",
                file=sys.stderr,
            )
            return None
        # A run that ended in the meantime has removed the file that was opened here; a third may hold its successor.
        if _is_at(descriptor, file):
            break
        os.close(descriptor)
    _held.add(descriptor)
    try:
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    except OSError:  # a full disk: the lock holds without its text
        pass
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


_held: set[int] = set()


def _let_go_in_child() -> None:
    # A worker that outlives its killed run for a moment would keep the lock.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
