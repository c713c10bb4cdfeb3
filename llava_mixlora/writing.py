"""Result files that are whole or absent, and writes that fail, in one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import MixLoraError

FULL = (errno.ENOSPC, errno.EDQUOT)
OF_WRITES = (*FULL, errno.EFBIG, errno.EROFS)
"""Errors of the operating system that nothing but a write has."""
IN_TORCH = ("PytorchStreamWriter", "iostream error", "inline_container")


def is_failed_write(error: BaseException) -> bool:
    """Whether something that only writes has failed at that, in Python, safetensors or torch.

    A write that fails inside of torch is a RuntimeError, whose message is all that tells it from others.
    """
    return isinstance(error, (OSError, SafetensorError)) or any(part in str(error) for part in IN_TORCH)


def reason_of(error: BaseException) -> str:
    """Why a write failed, in a few words."""
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
    if number in FULL or "No space left" in str(error):
        return "the disk is full"
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(place: str | Path, advice: str) -> Iterator[None]:
    """Name `place` where the body, which does nothing but write, cannot; `advice`: what to do then.

    Raises:
        MixLoraError: the disk is full, or the place may not be written.
    """
    try:
        yield
    except MixLoraError:
        raise
    except Exception as error:
        if not is_failed_write(error):
            raise
        raise MixLoraError(f"{place} could not be written ({reason_of(error)}); {advice}") from error


@contextmanager
def whole_file(file: Path, advice: str = "make room, or choose another --output") -> Iterator[Path]:
    """A file beside `file`, with its suffix, that takes its place when the body is done; gone when the body fails.

    Raises:
        MixLoraError: as [`writing`].
    """
    unfinished = file.with_name(f".unfinished-{file.name}")
    try:
        with writing(file, advice):
            yield unfinished
            os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is at every moment either as it was or as it is to be.

    Raises:
        MixLoraError: as [`writing`].
    """
    with whole_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
