"""Which part of the layers' statistics all processes of a training run have: what they loaded, or summed before.

Each process counts its own instances. What it has counted since is the difference between what a layer holds and what
is remembered here, so summing twice adds nothing twice, and what every process has loaded is not added at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layer import MixLoraLayer

Sums = tuple[Tensor, Tensor]
"""Of one layer and adapter: how often each factor was chosen, int64 [2, E], and moments, float64 [4, E, E]."""


def follow_loading(layer: MixLoraLayer, adapter: str) -> None:
    """Remember what is loaded into a layer with a new adapter, of which nothing has been counted yet."""
    if "_shared_sums" not in layer.__dict__:
        layer._register_load_state_dict_pre_hook(_note_loaded, with_module=True)
    _shared(layer).pop(adapter, None)


def statistics_of(model: nn.Module) -> Iterator[tuple[MixLoraLayer, str, Sums]]:
    """The statistics themselves, of every layer and adapter."""
    for module in model.modules():
        if isinstance(module, MixLoraLayer):
            for adapter, usage in module.mixlora_stats_usage.items():
                yield module, adapter, (usage, module.mixlora_stats_moments[adapter].view(torch.float64))


def shared_by(layer: MixLoraLayer, adapter: str) -> Sums | None:
    """Of a layer's statistics, those that every process has; None where that is nothing."""
    return _shared(layer).get(adapter)


def remember(layer: MixLoraLayer, adapter: str, sums: Sums) -> None:
    """Take `sums`, which are kept as they are, for what every process has."""
    _shared(layer)[adapter] = sums


def remember_all(model: nn.Module) -> None:
    """Take all that the layers hold for what every process has."""
    for layer, adapter, (usage, moments) in statistics_of(model):
        remember(layer, adapter, (usage.clone(), moments.clone()))


def has_counted(model: nn.Module, adapter: str) -> bool:
    """Whether this process has counted instances of an adapter that the others do not know of."""
    differences = []
    for layer, name, (usage, _) in statistics_of(model):
        if name == adapter and not usage.is_meta:
            shared = shared_by(layer, name)
            differences.append((usage if shared is None else usage - shared[0].to(usage.device)).any())
    return bool(differences) and bool(torch.stack([each.to(differences[0].device) for each in differences]).any())


def _shared(layer: MixLoraLayer) -> dict[str, Sums]:
    # An attribute and no buffer: it is neither saved nor moved, and no wrapper spreads it over the processes.
    return layer.__dict__.setdefault("_shared_sums", {})


def _note_loaded(layer: MixLoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for adapter in layer.mixlora_stats_usage:
        usage = state_dict.get(f"{prefix}mixlora_stats_usage.{adapter}")
        moments = state_dict.get(f"{prefix}mixlora_stats_moments.{adapter}")
        if usage is not None and moments is not None:
            remember(layer, adapter, (usage.detach().clone(), moments.detach().clone().view(torch.float64)))
