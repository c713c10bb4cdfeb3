"""The routes that a generation keeps: computed on its prompt, and bound to its cache.

A cache's keys and values were made under the routes of a prompt, so these go on with it, wherever it goes: they are an
attribute of the cache, which copies take along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache

from ..errors import MixLoraError

_ATTRIBUTE = "mixlora_routes"
_of_tuples: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""[`HeldRoutes`] by the first tensor of the tuples that transformers 4.37 hands around as caches."""


@dataclass(frozen=True)
class HeldRoutes:
    """Cores by layer and adapter, [G, E, E] (or gates, [G, E]) of the G segments of a prompt's B rows.

    `last`: int64 [B], the segment that each row ends with, and whose core all that follows keeps; None where G = B.
    Never changed, only replaced, so copies of a cache share them.
    """

    cores: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    last: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> HeldRoutes:
        return self

    def joined(self, cores: dict[tuple[str, str], Tensor], last: Tensor | None) -> HeldRoutes:
        """These and further cores."""
        return HeldRoutes({**self.cores, **cores}, self.last if last is None else last) if cores else self

    def core(self, key: tuple[str, str], instances: int, segments: int | None) -> Tensor | None:
        """What is kept for a layer and adapter, [instances, E, E], or [segments, E, E] for the whole prompt again.

        Raises:
            MixLoraError: the generation was begun with another number of instances.
        """
        core = self.cores.get(key)
        if core is None:
            return None
        if segments is not None and core.shape[0] == segments:
            return core
        if self.last is not None:
            core = core.index_select(0, self.last.to(core.device))
        if core.shape[0] == instances:
            return core
        if instances % core.shape[0] == 0:  # the cache was repeated to draw several continuations of each prompt
            return core.repeat_interleave(instances // core.shape[0], dim=0)
        raise MixLoraError(
            f"a generation that was begun with {core.shape[0]} instances goes on with {instances}: its routes are held "
            "per instance; keep the batch as it is, or use decode_routing='step'"
        )


def routes_of(cache: Any) -> HeldRoutes | None:
    """The routes under which a cache was filled; None where there are none."""
    cache = _identity(cache)
    if isinstance(cache, Tensor):
        return _of_tuples.get(cache)
    return getattr(cache, _ATTRIBUTE, None)


def bind(cache: Any, routes: HeldRoutes) -> None:
    """Let a cache keep the routes under which it was filled."""
    cache = _identity(cache)
    if isinstance(cache, Tensor):
        _of_tuples[cache] = routes
    elif cache is not None:
        setattr(cache, _ATTRIBUTE, routes)


def _identity(cache: Any) -> Cache | Tensor | None:
    if isinstance(cache, Cache):
        return cache
    while isinstance(cache, tuple) and cache:
        cache = cache[0]
    return cache if isinstance(cache, Tensor) else None
