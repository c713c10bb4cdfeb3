"""The entries of a data file, one after the other: a JSON list or JSON Lines, of any size, in little memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import MixLoraError
from ..inputs import check_regular
from ..limits import how_to_raise, limits

BLOCK = 1 << 20  # characters read at once
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which begins alike
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
EXPECTED = "a JSON list of conversations, or JSON Lines with one on each line"


def entries(path: str | Path) -> Iterator[Any]:
    """Each entry of a JSON list, or of JSON Lines, in UTF-8 (with or without a byte order mark) or as its mark says.

    Raises:
        MixLoraError: the file is missing, a pipe, not text, not JSON (with the number of the entry), or holds no
            entries; at the entry in question, after those before it.
    """
    number = 0
    check_regular(path)
    try:
        with Path(path).open("rb") as file:
            head = file.read(4)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        with Path(path).open(encoding=encoding) as text:
            for number, entry in enumerate(_values(_Window(text)), start=1):
                if number == 1 and isinstance(entry, _NotAnEntry):
                    raise MixLoraError(f"{path}: expected {EXPECTED}, got {entry.what}")
                yield entry
    except FileNotFoundError:
        raise MixLoraError(f"{path}: no such file; expected {EXPECTED}") from None
    except UnicodeDecodeError as error:
        where = f"behind entry {number - 1}" if number else "from its beginning"
        raise MixLoraError(
            f"{path}: not text in UTF-8 {where}; is it compressed, or another file? Expected {EXPECTED}"
        ) from error
    except json.JSONDecodeError as error:
        where = f"entry {number}" if number else "its beginning"
        raise MixLoraError(
            f"{path}: not valid JSON at {where} (line {error.lineno}: {error.msg}); is the download complete? "
            f"Expected {EXPECTED}"
        ) from error
    except ValueError as error:  # of a number with thousands of digits
        raise MixLoraError(f"{path}: entry {number} cannot be read ({error}); expected {EXPECTED}") from error
    except RecursionError:
        raise MixLoraError(f"{path}: entry {number} is nested too deep; expected {EXPECTED}") from None
    except OSError as error:
        raise MixLoraError(f"{path}: cannot be read ({error.strerror}); expected {EXPECTED}") from error
    if number == 0:
        raise MixLoraError(f"{path}: holds no entries; expected {EXPECTED}")


class _NotAnEntry:
    """What stands alone in a file where a list, or lines of entries, was expected."""

    def __init__(self, value: Any) -> None:
        self.what = f"one {type(value).__name__}"
        if isinstance(value, dict):
            self.what = f"one JSON object with the keys {', '.join(map(repr, list(value)[:3]))}"


def _values(window: _Window) -> Iterator[Any]:
    first = window.peek()
    if first == "[":
        window.skip("[")
        if window.peek() == "]":
            window.skip("]")
        else:
            yield window.value()
            while window.peek() == ",":
                window.skip(",")
                yield window.value()
            window.skip("]")
        if window.peek():
            window.fail("text behind the end of the list")
    elif first:
        value = window.value()
        alone = not window.peek()
        # A line of JSON Lines is an object, whose fields an entry has; one object of another form is no list of them.
        is_entry = isinstance(value, dict) and any(isinstance(field, list) for field in value.values())
        yield value if is_entry or not alone else _NotAnEntry(value)
        while window.peek():
            yield window.value()


class _Window:
    """The part of a text that is being parsed; what lies before it is forgotten, but for the number of its lines."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.place, self.lines, self.ended = file, "", 0, 0, False
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.place < len(self.text):
                if not self.text[self.place].isspace():
                    return self.text[self.place]
                self.place += 1
            if self.ended:
                return ""
            self._read(BLOCK)

    def skip(self, expected: str) -> None:
        if self.peek() != expected:
            self.fail(f"expected {expected!r}")
        self.place += 1

    def value(self) -> Any:
        self.peek()
        block = BLOCK
        while True:
            try:
                value, end = self.decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.ended or not self._may_go_on(error):
                    self.fail(error.msg, error.pos)
            else:
                if self.ended or end < len(self.text):  # a number at the window's end may go on behind it
                    self.place = end
                    return value
            if len(self.text) - self.place > (most := limits().json_bytes):
                self.fail(f"an entry of more than {most:,} letters {how_to_raise('json_bytes')}")
            self._read(block)
            block *= 2  # an entry longer than the window would else be parsed in vain as often as it has blocks

    def fail(self, message: str, place: int | None = None) -> None:
        place = self.place if place is None else place
        error = json.JSONDecodeError(message, self.text, place)
        error.lineno += self.lines
        raise error

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        # A string's error is told at its begin, all others where the parser stood; no word of JSON is longer than this.
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("-Infinity")

    def _read(self, size: int) -> None:
        more = self.file.read(size)
        self.ended = not more
        self.lines += self.text.count("\n", 0, self.place)
        self.text = self.text[self.place :] + more
        self.place = 0
