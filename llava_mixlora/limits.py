"""How large what is read may be: far above what anybody has, and far below what fills a memory or never ends.

[`raise_limits`] changes them, as `--input-limit NAME=NUMBER` of every command does; programs of other people obey the
variable [`VARIABLE`] of the environment, which processes hand to those that they start.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from .errors import MixLoraError

FLAG = "--input-limit"
VARIABLE = "LLAVA_MIXLORA_INPUT_LIMITS"
"""Of the environment: `NAME=NUMBER`, several with commas between."""


@dataclass(frozen=True)
class Limits:
    """Whole numbers.

    `json_bytes`, `json_depth`: of a JSON file that describes something, and of its nested lists and objects; the state
    of a run with 100,000 logged steps has 20 MB. `num_factors`: in a pool; an instance's core has as many rows and
    columns, so the default takes 64 MB in each layer. `tasks`: names that an adapter may have. `pattern_letters`,
    `pattern_bits`: of a regular expression over names of layers, which at worst matches a name in about 2 to the power
    of its bits steps; the default's take a hundredth of a second (see `method.patterns`). `pickle_operations`: steps of
    a pickle that are looked through for code. `image_pixels`: what Pillow takes for an attack; padding to a square
    counts the square's. `image_ratio`: longer side to shorter; cropping a square scales the shorter side to the tower's
    size, so that a picture of 1 x 20,000 pixels would take 20,000 x 336 x 336 of them. `image_bytes`: of a picture's
    file. `prompt_letters`: of one question or conversation that a model is asked; a context of 32,768 tokens holds
    about 130,000.
    """

    json_bytes: int = 64 << 20
    json_depth: int = 64
    num_factors: int = 4096
    tasks: int = 65_536
    pattern_letters: int = 4096
    pattern_bits: int = 20
    pickle_operations: int = 20_000_000
    image_pixels: int = 2 * (1024**3 // 4 // 3)
    image_ratio: int = 200
    image_bytes: int = 256 << 20
    prompt_letters: int = 250_000


NAMES = tuple(field.name for field in fields(Limits))


def limits() -> Limits:
    """Those in force.

    Raises:
        MixLoraError: [`VARIABLE`] is none of them.
    """
    return _of_words(os.environ.get(VARIABLE, ""))


def raise_limits(words: Iterable[str]) -> None:
    """Change limits by words such as `image_pixels=400000000`, in this process and those that it starts.

    Raises:
        MixLoraError: a word is not a name of [`NAMES`], `=` and a whole number of at least 1.
    """
    together = ",".join([*filter(None, [os.environ.get(VARIABLE)]), *words])
    _of_words(together)
    os.environ[VARIABLE] = together


def how_to_raise(name: str) -> str:
    """What a message about a limit says last."""
    return f"({FLAG} {name}=NUMBER, or {VARIABLE}={name}=NUMBER, allows more)"


def add_input_limit(parser: argparse.ArgumentParser) -> None:
    """Let a command's user change limits; the words are for [`raise_limits`]."""
    parser.add_argument(
        FLAG,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"read larger inputs than is safe with a stranger's; may be repeated. Names: {', '.join(NAMES)}",
    )


@functools.lru_cache(maxsize=8)
def _of_words(words: str) -> Limits:
    found = {}
    for word in filter(None, words.split(",")):
        name, _, number = word.strip().partition("=")
        if name not in NAMES or not (number.isdecimal() and int(number) > 0):
            raise MixLoraError(
                f"{FLAG} (or {VARIABLE}): {word!r:.80}; expected NAME=NUMBER, a whole number of at least 1 for one of "
                f"{', '.join(NAMES)}"
            )
        found[name] = int(number)
    return replace(Limits(), **found)
