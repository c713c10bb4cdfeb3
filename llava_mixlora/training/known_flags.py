"""A run's command line as upstream's parser reads it: the flags that are given, with their values, and no others."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..errors import MixLoraError


def read_flags(classes: Iterable[type], argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the flags that are given, by name, and the defaults of all flags that there are.

    Args:
        classes: the dataclasses whose fields the flags are; none is made.
        argv: the words of the command line.

    Raises:
        MixLoraError: a flag that is not among them, with the nearest that is, or a value of another kind.
    """
    # Of an abbreviation, which argparse would take, all that reads flags by their names would know nothing.
    parser = _Parser(classes, allow_abbrev=False)
    defaults: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest != "help":
            defaults.setdefault(action.dest, action.default)  # --no_FLAG comes after --FLAG, with a default of its own
        action.default, action.required = argparse.SUPPRESS, False
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise MixLoraError(_what_is_wrong_with(unknown[0], defaults))
    return vars(given), defaults


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MixLoraError(f"{' '.join(message.split())}; --help lists all flags")


def _what_is_wrong_with(word: str, defaults: dict[str, Any]) -> str:
    if not word.startswith("--"):
        return f"{word}: belongs to no flag of training; expected --flag value"
    name = word[2:].partition("=")[0].replace("-", "_")
    nearest = [flag for flag in defaults if flag.startswith(name)] or difflib.get_close_matches(name, defaults, n=1)
    hint = f"did you mean --{nearest[0]}?" if nearest else "is it a flag of another version, or of another program?"
    return f"{word.partition('=')[0]}: no flag of training; {hint} --help lists all"
