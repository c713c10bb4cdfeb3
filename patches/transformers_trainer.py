"""`transformers.trainer`: a name that `llava.train.llava_trainer` imports from there and that has moved."""

from __future__ import annotations

from .patch import Patch


def _layernorm_layers(_: None) -> list[type]:
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    return ALL_LAYERNORM_LAYERS


PATCHES = (
    Patch(
        "transformers.trainer:ALL_LAYERNORM_LAYERS",
        why="llava.train.llava_trainer imports this list from transformers.trainer, which no longer holds it",
        replace=_layernorm_layers,
        requires={"transformers": ">=5"},
        adds=True,
    ),
)
