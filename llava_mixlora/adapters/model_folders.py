"""Folders that commands read a base model from and write their results to; those appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MixLoraError
from ..folder_lock import lock_file
from ..inputs import expanded
from ..writing import writing


def base_folder(model_base: str, flag: str = "--model-base") -> Path:
    """The folder of a base model, or a tower, downloaded when `model_base`, given as `flag`, is a hub name.

    Raises:
        MixLoraError: there is no such folder, or the download fails.
    """
    folder = expanded(model_base)
    if folder.is_dir():
        return folder
    if model_base.startswith((".", "/", "~")) or model_base.count("/") != 1:
        raise MixLoraError(f"{flag} {model_base}: no such folder; expected a model or a hub name like owner/name")
    from huggingface_hub import snapshot_download  # from here on it takes a network

    try:
        return Path(snapshot_download(model_base, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]))
    except Exception as error:  # offline, no such repository, no access: each has its own class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MixLoraError(f"{flag} {model_base} cannot be downloaded ({reason}); pass its folder") from error


def check_output(flag: str, output: Path) -> None:
    """Refuse to write over what is there, and where nothing can be written.

    Raises:
        MixLoraError: `output`, given as `flag`, is there and is not an empty folder, or cannot be made.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MixLoraError(f"{flag} {output} exists and is not an empty folder; choose another, or remove it first")
    try:
        with tempfile.TemporaryFile(dir=_first_that_exists(output.absolute().parent)):
            pass
    except OSError as error:
        raise MixLoraError(f"{flag} {output} cannot be written ({error.strerror}); choose another") from error


def check_room(flag: str, output: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        MixLoraError: fewer than `needed` bytes are free where `output` goes.
    """
    free = shutil.disk_usage(_first_that_exists(output.absolute())).free
    if free < needed:
        raise MixLoraError(
            f"{flag} {output}: {_gigabytes(needed)} are needed, but its disk has {_gigabytes(free)} free; make room, "
            "or choose a folder on another disk"
        )


@contextmanager
def new_folder(flag: str, output: Path) -> Iterator[Path]:
    """A folder of the name of `output` that takes its place when the body is done, and is gone when the body fails.

    Only a killed process leaves it, in `.NAME.unfinished` beside `output`; the next one for the same `output` removes
    it first. Two at a time would undo each other's work, so the second is refused.

    Raises:
        MixLoraError: it cannot be written, or another process is writing it; `flag` is what `output` was given as.
    """
    output = output.absolute()
    unfinished = output.with_name(f".{output.name}.unfinished")
    with lock_file(output.with_name(f".{output.name}.lock"), output, flag):
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with writing(f"{flag} {output}", "make room, or choose another"):
                folder = unfinished / output.name
                folder.mkdir(parents=True)
                yield folder
                if output.exists():
                    output.rmdir()
                folder.rename(output)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _first_that_exists(folder: Path) -> Path:
    return next(there for there in (folder, *folder.parents) if there.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size:,} bytes"
