"""What users give to several commands, read and checked: JSON files, models and folders."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from .errors import MixLoraError


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        MixLoraError: the file is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixLoraError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise MixLoraError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise MixLoraError(f"{file} is damaged: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise MixLoraError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}; copy it again")
    return content


def check_model_path(flag: str, value: str | None) -> None:
    """Refuse a local path that does not exist; a hub name such as `lmsys/vicuna-7b-v1.5` passes."""
    if value and (value.startswith((".", "/", "~")) or value.count("/") > 1) and not Path(value).expanduser().exists():
        raise MixLoraError(f"{flag} {value}: no such folder; expected a local model or a hub name like owner/name")


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Create `folder`, given as `flag`, if need be, and refuse one that cannot be written.

    Raises:
        MixLoraError: with the operating system's reason.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MixLoraError(f"{folder}: cannot be written ({error.strerror}); choose another {flag}") from error


def positive(word: str) -> int:
    """A command line's word as a whole number of at least 1, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number of at least 1")
    return number
