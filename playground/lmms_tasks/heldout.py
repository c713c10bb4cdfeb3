"""What lmms-eval calls for `heldout.yaml`: the held-out questions of the embedded default, in LLaVA's data format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from llava_mixlora.evaluation.metrics import exact_match

IMAGES = Path(__file__).parents[1] / "cache" / "data" / "images"


def pictures(sample: dict[str, Any]) -> list[Image.Image]:
    """The one picture that is asked about."""
    return [Image.open(IMAGES / sample["image"]).convert("RGB")]


def question(sample: dict[str, Any]) -> str:
    """The question; lmms-eval puts the image before it, as LLaVA does."""
    return sample["conversations"][0]["value"].removeprefix("<image>\n")


def truth(sample: dict[str, Any]) -> str:
    """The right answer."""
    return sample["conversations"][1]["value"]


def score(sample: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether the answer is right, once for all questions and once for those of its task."""
    hit = float(exact_match(answers[0], truth(sample)))
    return {"exact_match": hit, sample["task"]: hit}
