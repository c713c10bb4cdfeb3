"""What a vision tower's `config.json` tells of it: its form, and how many positions an image takes of a sequence."""

from __future__ import annotations

from typing import NamedTuple

from transformers import CLIPVisionConfig

from .config_file import config_of


class Tower(NamedTuple):
    """The form of a CLIP tower; sizes are numbers of features, image and patch are in pixels."""

    hidden_size: int
    image_size: int
    patch_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    def image_tokens(self, select_feature: str = "patch") -> int:
        """How many features of an image, and so positions of a sequence, LLaVA takes from it."""
        return (self.image_size // self.patch_size) ** 2 + (select_feature == "cls_patch")


def tower_config(tower: str | None, cache_dir: str | None = None) -> Tower | None:
    """The form of a tower, by its folder or hub name; None where its `config.json` cannot be had."""
    found = config_of(tower, cache_dir)
    if found is None:
        return None
    found = found.get("vision_config", found)  # of a CLIP with its text model, as OpenAI's are stored
    return Tower(**{name: found.get(name, getattr(CLIPVisionConfig(), name)) for name in Tower._fields})
