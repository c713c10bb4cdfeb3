"""`llava.mm_utils`: answers that end where they should."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .patch import FAULT, Patch


def _without_empty_words(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, keywords: list[str], *args: Any, **kwargs: Any) -> None:
        original(self, [word for word in keywords if word != ""], *args, **kwargs)

    return __init__


PATCHES = (
    Patch(
        "llava.mm_utils:KeywordsStoppingCriteria.__init__",
        kind=FAULT,
        why="the command line's stop word is empty for mistral_instruct, and every text has that: a Mistral's answers "
        "would end after their first token",
        replace=_without_empty_words,
        parameters=("keywords",),
    ),
)
