"""Result files that are whole or absent, and writes that fail, in one line."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import MixLoraError

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT)
OF_WRITES = (*FULL, errno.EFBIG, errno.EROFS)
"""Errors of the operating system that nothing but a write has."""
IN_RUST = re.compile(r"\(os error (\d+)\)")
IN_TORCH = ("PytorchStreamWriter", "iostream error", "inline_container")


def is_failed_write(error: BaseException) -> bool:
    """Whether something that only writes has failed at that, in Python, safetensors or torch.

    A write that fails inside of torch is a RuntimeError, and one inside of tokenizers a bare Exception, whose message
    is all that tells it from others.
    """
    known = isinstance(error, (OSError, SafetensorError)) or IN_RUST.search(str(error)) is not None
    return known or any(part in str(error) for part in IN_TORCH)


def reason_of(error: BaseException) -> str:
    """Why a write failed, in a few words."""
    in_rust = IN_RUST.search(str(error))
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
    """A new file beside `file`, with its suffix, that takes its place when the body is done; gone when the body fails.

    Nothing is written through links: neither `file` nor what lies beside it is opened, whatever it may be.

    Raises:
        MixLoraError: as [`writing`].
    """
    unfinished = None
    try:
        with writing(file, advice):
            descriptor, name = tempfile.mkstemp(prefix=".unfinished-", suffix=f"-{file.name}", dir=file.parent)
            os.close(descriptor)
            unfinished = Path(name)
            yield unfinished
            follow_umask(unfinished)
            os.replace(unfinished, file)
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


def follow_umask(*files: Path) -> None:
    """Let others read files as far as the process lets others read its files; some are made for their owner alone."""
    mask = os.umask(0o077)  # there is no other way to ask, and a file that is made meanwhile is none too open
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file for PyTorch, with the mode that other files have."""
    from safetensors.torch import save_file  # needs torch, without which `doctor` has to start

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    follow_umask(file)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is at every moment either as it was or as it is to be.

    Raises:
        MixLoraError: as [`writing`].
    """
    with whole_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
