"""`transformers.trainer`: a name that LLaVA imports from there, and checkpoints that PyTorch must be told to trust."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import torch

from .patch import COMPATIBILITY, Patch


def _layernorm_layers(_: None) -> list[type]:
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    return ALL_LAYERNORM_LAYERS


def _trust_numpy(original: Callable[..., None]) -> Callable[..., None]:
    types = [type(numpy.dtype(kind)) for kind in (numpy.uint32, numpy.uint64)]
    trusted = [numpy.core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, *types]

    @functools.wraps(original)
    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        with torch.serialization.safe_globals(trusted):
            original(self, checkpoint)

    return _load_rng_state


PATCHES = (
    Patch(
        "transformers.trainer:ALL_LAYERNORM_LAYERS",
        kind=COMPATIBILITY,
        why="llava.train.llava_trainer imports this list from transformers.trainer, which no longer holds it",
        replace=_layernorm_layers,
        requires={"transformers": ">=4.53"},
        adds=True,
    ),
    Patch(
        "transformers.trainer:Trainer._load_rng_state",
        kind=COMPATIBILITY,
        why="a checkpoint holds the state of NumPy's generator, which torch.load now reads only where it is told to "
        "trust NumPy's types",
        replace=_trust_numpy,
        requires={"transformers": "<4.47", "torch": ">=2.6"},
    ),
)
