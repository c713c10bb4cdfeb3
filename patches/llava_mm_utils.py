"""`llava.mm_utils`: answers that end where they should, and pictures that fit into memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.data.images import size_problem
from llava_mixlora.errors import MixLoraError

from .patch import FAULT, Patch


def _without_empty_words(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, keywords: list[str], *args: Any, **kwargs: Any) -> None:
        original(self, [word for word in keywords if word != ""], *args, **kwargs)

    return __init__


def _refuse_thin_images(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_images(images: Any, image_processor: Any, model_cfg: Any) -> Any:
        padded = getattr(model_cfg, "image_aspect_ratio", None) == "pad"
        for image in images:
            if problem := size_problem(*image.size, padded):
                raise MixLoraError(f"an image of {problem}")
        return original(images, image_processor, model_cfg)

    return process_images


PATCHES = (
    Patch(
        "llava.mm_utils:process_images",
        kind=FAULT,
        why="a picture's shorter side is scaled to the tower's, or its longer side makes a square: one of 1 x 5,000 "
        "pixels takes 5.8 GB",
        replace=_refuse_thin_images,
        parameters=("images", "image_processor", "model_cfg"),
    ),
    Patch(
        "llava.mm_utils:KeywordsStoppingCriteria.__init__",
        kind=FAULT,
        why="the command line's stop word is empty for mistral_instruct, and every text has that: a Mistral's answers "
        "would end after their first token",
        replace=_without_empty_words,
        parameters=("keywords",),
    ),
)
