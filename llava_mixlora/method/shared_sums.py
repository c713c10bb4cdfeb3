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
from .word_centre import WORDS, word_adapters

Sums = tuple[Tensor, ...]
"""Of one owner and adapter. Of a layer: how often each factor was chosen, int64 [2, E], and moments, float64 [4, E, E].

Of a model: the sum of word vectors, float64 [d_model + 1].
"""

_KINDS_OF_LAYERS = ("mixlora_stats_usage", "mixlora_stats_moments")


def follow_loading(owner: nn.Module, adapter: str) -> None:
    """Remember what is loaded into an owner with a new adapter, of which nothing has been counted yet."""
    if "_shared_sums" not in owner.__dict__:
        owner._register_load_state_dict_pre_hook(_note_loaded, with_module=True)
    _shared(owner).pop(adapter, None)


def statistics_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Sums]]:
    """The statistics themselves, of every layer and adapter, and of every model with sums of words."""
    for module in model.modules():
        if kinds := kinds_of(module):
            for adapter in getattr(module, kinds[0]):
                yield module, adapter, tuple(_as_numbers(kind, getattr(module, kind)[adapter]) for kind in kinds)


def kinds_of(owner: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that a module counts in; none for most."""
    if isinstance(owner, MixLoraLayer):
        return _KINDS_OF_LAYERS
    return () if word_adapters(owner) is None else (WORDS,)


def shared_by(owner: nn.Module, adapter: str) -> Sums | None:
    """Of an owner's statistics, those that every process has; None where that is nothing."""
    return _shared(owner).get(adapter)


def remember(owner: nn.Module, adapter: str, sums: Sums) -> None:
    """Take `sums`, which are kept as they are, for what every process has."""
    _shared(owner)[adapter] = sums


def remember_all(model: nn.Module) -> None:
    """Take all that was counted for what every process has."""
    for owner, adapter, sums in statistics_of(model):
        remember(owner, adapter, tuple(each.clone() for each in sums))


def has_counted(model: nn.Module, adapter: str) -> bool:
    """Whether this process has counted instances of an adapter that the others do not know of."""
    differences = []
    for owner, name, (usage, *_) in statistics_of(model):
        if name == adapter and not usage.is_meta:
            shared = shared_by(owner, name)
            differences.append((usage if shared is None else usage - shared[0].to(usage.device)).any())
    return bool(differences) and bool(torch.stack([each.to(differences[0].device) for each in differences]).any())


def _as_numbers(kind: str, buffer: Tensor) -> Tensor:
    return buffer if kind == "mixlora_stats_usage" else buffer.view(torch.float64)


def _shared(owner: nn.Module) -> dict[str, Sums]:
    # An attribute and no buffer: it is neither saved nor moved, and no wrapper spreads it over the processes.
    return owner.__dict__.setdefault("_shared_sums", {})


def _note_loaded(owner: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    kinds = kinds_of(owner)
    for adapter in getattr(owner, kinds[0]) if kinds else ():
        loaded = [state_dict.get(f"{prefix}{kind}.{adapter}") for kind in kinds]
        if all(each is not None for each in loaded):
            sums = (_as_numbers(kind, each.detach().clone()) for kind, each in zip(kinds, loaded))
            remember(owner, adapter, tuple(sums))
