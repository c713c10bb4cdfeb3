"""JSON Lines that a process appends to which may be killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MixLoraError
from ..inputs import text_lines
from ..writing import writing


def read_lines(file: Path, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file, [] when there is none; a last line that a killed process left torn is dropped.

    `kinds`: the fields that each has, and of which type they are.

    Raises:
        MixLoraError: another line is damaged, or lacks one of the fields.
    """
    if not os.path.lexists(file):
        return []
    found, hint = [], "remove it, or choose another --output"
    for number, text in enumerate(text_lines(file, hint), start=1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MixLoraError(f"{file} is damaged (line {number}: {error}); {hint}") from error
        if not (isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())):
            wanted = " and ".join(kinds)
            raise MixLoraError(f"{file} is damaged (line {number} has not {wanted} as they were written); {hint}")
        found.append(line)
    return found


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
