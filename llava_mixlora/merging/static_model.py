"""A model with static updates in the place of its adapter's, for as long as they are tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..method.model import ADAPTER, adapted_layers
from .static_adapter import StaticUpdates


@contextmanager
def static_in_place(model: nn.Module, updates: StaticUpdates) -> Iterator[None]:
    """Run the body with static updates in the place of the adapter's, and no weight changed."""

    def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0].to(down.dtype), down), up).to(output.dtype)

    layers, hooks = adapted_layers(model), []
    try:
        # Layer by layer: what else was trained, such as modules to save, stays as it is in what is merged.
        for name, layer in layers.items():
            device = layer.mixlora_A[ADAPTER].device
            down, up = (matrix.to(device) for matrix in updates[name])
            hooks.append(layer.register_forward_hook(partial(add, down=down, up=up)))
            layer.enable_adapters(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.enable_adapters(True)
