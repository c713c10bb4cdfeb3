"""`llava.train.llava_trainer`: what `--mixlora_init_from` names goes into the model that is about to be trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.training.continuing import take_over

from .patch import METHOD, Patch


def _take_over_first(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        # train() has just put together all that is trained, and the Trainer is yet to move, cast or partition it.
        if (folder := getattr(args, "mixlora_init_from", None)) is not None:
            take_over(model, folder)
        original(self, model=model, args=args, **kwargs)

    return __init__


PATCHES = (
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=METHOD,
        why="train() always starts with a new adapter (haotian-liu/LLaVA#1027 #905 #947)",
        replace=_take_over_first,
        parameters=("model", "args"),
    ),
)
