"""JSON Lines that a process appends to which may be killed at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import MixLoraError
from ..writing import writing


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, [] when there is none; a last line that a killed process left torn is dropped.

    Raises:
        MixLoraError: another line is damaged.
    """
    if not file.is_file():
        return []
    try:
        *whole, _torn = file.read_text(encoding="utf-8").split("\n")
        lines = [json.loads(line) for line in whole]
    except (ValueError, RecursionError) as error:
        raise MixLoraError(f"{file} is damaged ({error}); remove it, or choose another --output") from error
    if not all(isinstance(line, dict) for line in lines):
        raise MixLoraError(f"{file} is damaged (a line is no object); remove it, or choose another --output")
    return lines


def append_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """Add objects to a file, all of them or none, so that a full disk leaves no torn line.

    Raises:
        MixLoraError: the disk is full, or the file may not be written.
    """
    advice = "make room; the same command then asks only what has no answer yet"
    with writing(file, advice), file.open("ab", buffering=0) as written:
        before = written.tell()
        try:
            rest = "".join(json.dumps(line) + "\n" for line in lines).encode()
            while rest:
                rest = rest[written.write(rest) :]
        except BaseException:
            written.truncate(before)
            raise
