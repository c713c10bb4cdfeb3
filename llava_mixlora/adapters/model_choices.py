"""What a user says of a model's parts, beside its name and its base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelChoices:
    """How a model is put together.

    Args:
        vision_tower: a folder or hub name, in the place of the tower that the model's configuration names.
        allow_other_base: take a base or vision tower that is known not to be the one of its training.
        allow_incomplete: load an adapter that lacks tensors, whose layers then do what untrained ones do.
    """

    vision_tower: str | None = None
    allow_other_base: bool = False
    allow_incomplete: bool = False


AS_NAMED = ModelChoices()
"""The model as its configuration and its record name it."""
