"""Regular expressions over names of layers that are certain to come to an end.

Python's `re` tries one way after the other, so a short expression can take longer than the universe is old, and nothing
can interrupt it. How many ways there are is therefore bounded before an expression is used. The bound counts bits: a
repeat of any letter could end at each of the about 64 letters of a name (6 bits), one of digits at each of four (2), an
optional part has two ways (1), and of alternatives each may be taken. Ways multiply, so bits add up.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any

from ..errors import MixLoraError
from ..limits import limits

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as parser
else:
    import sre_constants as sre
    import sre_parse as parser

REPEATS = {getattr(sre, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(sre, name)}
ANY, NARROW = 6, 2  # bits of a repeat: of letters as names are made of, and of digits or a single letter
DIGITS = [(sre.CATEGORY, sre.CATEGORY_DIGIT)]


def check_pattern(field: str, pattern: str, whole: str = "{}") -> None:
    """Refuse an expression that is none, or that could run on for minutes.

    Args:
        field: what the message calls it.
        pattern: the expression; `re.fullmatch` and `re.match` are to be called with it on names of layers.
        whole: what it becomes a part of before that.

    Raises:
        MixLoraError: it is not valid, too long, or has too many ways to match.
    """
    shown = repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
    if len(pattern) > (most := limits().pattern_letters):
        raise MixLoraError(
            f"{field}={shown}: {len(pattern):,} letters, and an expression may have {most:,}; name the layers in a list"
        )
    try:
        re.compile(pattern)
        bits = _bits(parser.parse(whole.format(pattern)), looped=False)
    except re.error as error:
        raise MixLoraError(f"{field}={shown}: not a valid regular expression ({error})") from None
    except (RecursionError, OverflowError) as error:
        raise MixLoraError(f"{field}={shown}: not a usable regular expression ({type(error).__name__})") from None
    if bits > limits().pattern_bits:
        raise MixLoraError(
            f"{field}={shown}: matching a name could take minutes; expected few repeats, and none within another; "
            "name the layers in a list, or make it simpler"
        )


def _bits(parts: Any, looped: bool) -> float:
    """The logarithm of how many ways a sequence has; infinite where nothing bounds them. `looped`: inside a repeat."""
    return sum(_bits_of(kind, value, looped) for kind, value in parts)


def _bits_of(kind: Any, value: Any, looped: bool) -> float:
    if kind in REPEATS:
        least, most, inner = value
        if least == most == 1:
            return _bits(inner, looped)
        if looped and least != most:
            return math.inf
        inside = _bits(inner, looped or most > 1)
        if most > 1:  # each round multiplies the ways that it has
            return math.inf if inside else 0 if least == most else _bits_of_loop(inner, most - least)
        return 1 + inside
    if kind is sre.SUBPATTERN:
        return _bits(value[-1], looped)
    if kind is sre.BRANCH:
        alternatives = value[1]
        return math.log2(len(alternatives)) + max(_bits(each, looped) for each in alternatives)
    if kind in (sre.ASSERT, sre.ASSERT_NOT):  # is left with one answer
        return math.inf if _bits(value[1], looped) > limits().pattern_bits else 0
    if kind in (sre.GROUPREF, sre.GROUPREF_EXISTS):
        return math.inf
    return _bits(value, looped) if kind is getattr(sre, "ATOMIC_GROUP", None) else 0


def _bits_of_loop(inner: Any, rounds: int) -> float:
    kind, value = inner[0] if len(inner) == 1 else (None, None)
    is_narrow = kind is sre.LITERAL or (kind is sre.IN and value in (DIGITS, [(sre.RANGE, (48, 57))]))
    return min(NARROW if is_narrow else ANY, math.log2(1 + rounds))
