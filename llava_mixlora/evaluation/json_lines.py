"""Result files of a process that may be killed at any moment: JSON Lines that it appends to, and whole files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import MixLoraError


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, [] when there is none; a last line that a killed process left torn is dropped.

    Raises:
        MixLoraError: another line is damaged.
    """
    if not file.is_file():
        return []
    *whole, _torn = file.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise MixLoraError(f"{file} is damaged ({error}); remove it, or choose another --output") from error


def write_whole(file: Path, text: str) -> None:
    """Write a file that is at every moment either as it was or as it is to be."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
