"""What users give to several commands, read and checked: JSON files, models and folders."""

from __future__ import annotations

import argparse
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import MixLoraError
from .limits import how_to_raise, limits


def read_json(file: Path, only_numbers: bool = True) -> dict:
    """The object in a JSON file.

    Args:
        file: a regular file, or a link to one.
        only_numbers: refuse NaN and Infinity, which JSON does not have; what Trainer logs may hold them.

    Raises:
        MixLoraError: the file is missing, cannot be read, is not JSON, is larger or deeper than [`limits`] say, names
            a key twice, or holds something else than an object.
    """
    try:
        content = json.loads(
            _text(file),
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_number if only_numbers else None,
            parse_float=_finite if only_numbers else None,
        )
        if _depth(content) > limits().json_depth:
            raise RecursionError
    except FileNotFoundError:
        raise MixLoraError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise MixLoraError(f"{file} cannot be read ({error.strerror})") from error
    except RecursionError:
        raise MixLoraError(f"{file} is nested more than {limits().json_depth} deep; is it the right file?") from None
    except MixLoraError as error:
        raise MixLoraError(f"{file} {error}") from None
    except ValueError as error:
        raise MixLoraError(f"{file} is damaged: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise MixLoraError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}; copy it again")
    return content


def check_regular(file: str | Path) -> None:
    """Refuse a pipe or a device in place of a file, which might never end.

    What is not there, or is a folder, passes: opening it fails at once.

    Raises:
        MixLoraError: the file is one.
    """
    try:
        kind = os.stat(file).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise MixLoraError(f"{file} is no regular file; expected one, which can be read more than once")


def text_lines(file: Path, hint: str) -> Iterator[str]:
    """The lines of a text in UTF-8, one after the other, with their ends; a sign that only some take for one is none.

    `hint`: what a message says last.

    Raises:
        MixLoraError: the file is no regular one, cannot be read, is no text, or has a line that is larger than JSON may
            be.
    """
    check_regular(file)
    number, most = 0, limits().json_bytes
    try:
        with open(file, encoding="utf-8-sig") as text:
            while line := text.readline(most + 1):
                number += 1
                if len(line) > most:
                    more = f"more than {most:,} letters {how_to_raise('json_bytes')}"
                    raise MixLoraError(f"{file}, line {number}: {more}; {hint}")
                yield line
    except UnicodeDecodeError as error:
        raise MixLoraError(f"{file} is not text in UTF-8 ({error.reason} behind line {number}); {hint}") from error
    except OSError as error:
        raise MixLoraError(f"{file} cannot be read ({error.strerror}); {hint}") from error


def _text(file: Path) -> str:
    # Opening a pipe would wait for somebody who writes into it.
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise MixLoraError("is no regular file; copy it again")
        if found.st_size > (most := limits().json_bytes):
            raise MixLoraError(
                f"has {found.st_size:,} bytes, and what is read has {most:,} at most; is it the right file? "
                f"{how_to_raise('json_bytes')}"
            )
        return opened.read().decode("utf-8")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MixLoraError(f"is damaged: it names {_short(twice)} twice, so one of the two is not meant; correct it")
    return content


def _no_number(word: str) -> float:
    raise MixLoraError(f"is damaged: it holds {word}, which is no number; copy it again")


def _finite(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise MixLoraError(f"is damaged: it holds {_short(word)}, which is too large for a number; copy it again")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _depth(content: Any) -> int:
    """How deep lists and objects are nested; counting ends a step above the limit."""
    depth, level, most = 0, [content], limits().json_depth
    while level and depth <= most:
        inner: list[Any] = []
        for each in level:
            inner.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        depth += any(isinstance(each, (dict, list)) for each in level)
        level = inner
    return depth


def expanded(name: str | Path) -> Path:
    """A path with the home that its ~ stands for; as it is where there is none, of which `Path` makes an error."""
    return Path(os.path.expanduser(name))


def check_model_path(flag: str, value: str | None) -> None:
    """Refuse a local path that does not exist; a hub name such as `lmsys/vicuna-7b-v1.5` passes."""
    if value and (value.startswith((".", "/", "~")) or value.count("/") > 1) and not expanded(value).exists():
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


def add_allow_incomplete(parser: argparse.ArgumentParser) -> None:
    """Let a command's user load adapters that lack tensors."""
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="load an adapter that lacks tensors, whose layers then do what untrained ones do",
    )


def positive(word: str) -> int:
    """A command line's word as a whole number of at least 1, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number of at least 1")
    return number
