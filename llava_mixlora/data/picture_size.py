"""The size of the pictures that a vision tower takes, where a LLaVA has given it another than the tower's own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def side_taken(tower: nn.Module) -> int | None:
    """Side in pixels of the squares that a tower's positions cover; None where its configuration says the same.

    A fork may stretch the positions to larger pictures after it has loaded the tower, which no file then tells.
    """
    for module in tower.modules():
        positions, patch = getattr(module, "position_embedding", None), getattr(module, "patch_size", None)
        if isinstance(positions, nn.Embedding) and isinstance(patch, int):
            # One position may be the class token's: fewer than the next square has more.
            side = math.isqrt(positions.num_embeddings) * patch
            return None if side == getattr(getattr(module, "config", None), "image_size", side) else side
    return None


def take_size_of(tower: nn.Module | None, image_processor: Any) -> None:
    """Let an image processor make pictures of the size that the tower takes, if that is not the tower's own."""
    side = None if tower is None else side_taken(tower)
    if side is not None and getattr(image_processor, "crop_size", None) is not None:
        image_processor.size = {"shortest_edge": side}
        image_processor.crop_size = {"height": side, "width": side}
