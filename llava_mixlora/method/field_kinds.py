"""Of which kind the values of a configuration's fields have to be; it may come from a file that anybody has written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import TaskType

from ..errors import MixLoraError

LONGEST_PATH, LONGEST_NAME = 4096, 256  # bytes, of Linux; longer ones cannot even be looked for
Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of the kind, and what the kind is called."""


def is_number(value: Any) -> bool:
    """Whether it is one, and finite."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point ones
        return False


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_place(value: Any) -> bool:
    """Whether it can be the name of a folder, or of a model on the hub, which is shorter."""
    try:
        name = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False
    return b"\0" not in name and len(name) < LONGEST_PATH and all(len(part) < LONGEST_NAME for part in name.split(b"/"))


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Compare fields with what they are to be; None passes in the name of a default where a kind says so.

    Raises:
        MixLoraError: names the first that is of another kind.
    """
    for name, (fits, words) in kinds.items():
        if name in fields and not fits(fields[name]):
            shown = repr(fields[name])
            shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
            raise MixLoraError(f"{name}={shown}: expected {words}")


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple, set, frozenset)) and _each(fits, value)


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and _each(_is_text, value) and _each(fits, value.values())


def _each(fits: Callable[[Any], bool], values: Iterable[Any]) -> bool:
    return all(map(fits, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


NUMBER: Kind = (is_number, "a number")
WHOLE: Kind = (is_whole, "a whole number")
TRUTH: Kind = (_is_truth, "true or false")
TEXT: Kind = (_or_none(is_place), "a name")
NAMES: Kind = (_or_none(_all(_is_text)), "a list of names")
PATTERN: Kind = (_or_none(lambda value: _is_text(value) or _all(_is_text)(value)), "a list of names, or an expression")
INDICES: Kind = (_or_none(lambda value: is_whole(value) or _all(is_whole)(value)), "a whole number, or a list of them")
RANKS: Kind = (_or_none(_by_name(is_whole)), "whole numbers by name")
NUMBERS: Kind = (_or_none(_by_name(is_number)), "numbers by name")
TASK_TYPE: Kind = (_or_none(lambda value: value in list(TaskType)), f"one of {', '.join(TaskType)}")
TEXTS: Kind = (_or_none(_by_name(_or_none(_is_text))), "names by name")

OF_ANY_ADAPTER: dict[str, Kind] = {
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "auto_mapping": TEXTS,
    "inference_mode": TRUTH,
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "target_modules": PATTERN,
    "exclude_modules": PATTERN,
    "layers_to_transform": INDICES,
    "layers_pattern": PATTERN,
    "rank_pattern": RANKS,
    "alpha_pattern": NUMBERS,
    "modules_to_save": NAMES,
}
"""Fields that LoRA has too."""
