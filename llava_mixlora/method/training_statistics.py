"""What a training forward pass adds to the statistics of its layers, made for many layers at once.

The moments are sums of small matrices. On a small model their operations cost less than starting them from within a
layer, between large operations that leave the processor's caches cold. So a layer only hands over its z and its cores,
and the moments are made for many layers in a row: when the forward pass is over, or when [`MOST_NUMBERS`] wait.

Where autograd keeps z and cores for the backward pass, waiting takes no memory. Where it does not keep z (with dropout,
or routers without a gradient) it takes what [`MOST_NUMBERS`] take: of LLaVA-7B (224 layers, E = 16, S = 700, B = 16)
the z of 45 layers, 32 MB in float32. Moments that wait to be added take 32·E² bytes a layer, there 1.8 MB in all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .mixture import full_core
from .recomputation import is_checkpointed_selectively
from .routing_statistics import choices
from .segments import Segments
from .static_core import instance_grams, summed_moments

MOST_NUMBERS = 2**23
"""In z and cores together, before moments are made of them."""
STACKED_NUMBERS = 2**21
"""Of z at most, that are copied to make moments of several layers at once; 8 MB in float32."""


class Statistics(NamedTuple):
    """What a layer sums for an adapter: `usage` int64 [2, E], and `moments` [4, E, E], the bits of float64 numbers."""

    usage: Tensor
    moments: Tensor


class _Pass(NamedTuple):
    """One layer's forward pass: z [B, S, E], cores [B, E, E] or gates [B, E], attended [B, S], and its totals.

    With `segments` there are cores [G, E, E], or gates [G, E].
    """

    total: Statistics
    z: Tensor
    cores: Tensor
    attended: Tensor | None
    segments: Segments | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for layers whose statistics can be made together."""
        return self.z.shape, self.z.dtype, self.cores.shape, self.cores.device, id(self.attended), id(self.segments)


def _unseen_by_checkpoints() -> AbstractContextManager[Any]:
    """No dispatch modes, where one is a selective checkpoint's: it counts on the same operations in both passes."""
    return _disable_current_modes() if is_checkpointed_selectively() else nullcontext()


def _statistics_of(passes: list[_Pass]) -> list[tuple[Statistics, Statistics]]:
    """Totals, and what is to be added to them, of layers of one kind: as many operations as of one layer."""
    z = torch.stack([each.z for each in passes])
    cores = full_core(torch.stack([each.cores for each in passes]), dims=3)
    attended, segments = passes[0].attended, passes[0].segments
    grams = instance_grams(z, attended) if segments is None else segments.grams(z, attended)
    made = zip(choices(cores), summed_moments(grams, cores))
    return [(each.total, Statistics(*of_layer)) for each, of_layer in zip(passes, made)]


class TrainingStatistics:
    """The statistics of one forward pass of a model, until they are added to the totals of its layers.

    A forward pass that fails is never added, so it counts in all of its layers or in none.
    """

    def __init__(self) -> None:
        self._waiting: list[_Pass] = []
        self._numbers = 0
        self._made: list[tuple[Statistics, Statistics]] = []  # totals, and what is to be added to them

    @property
    def made_bytes(self) -> int:
        """What statistics take that have been made and not yet added."""
        return sum(tensor.nbytes for _, made in self._made for tensor in made)

    @property
    def waiting_bytes(self) -> int:
        """What z and cores take that no statistics are made of yet; where autograd keeps them, they take it anyway."""
        return sum(each.z.nbytes + each.cores.nbytes for each in self._waiting)

    def note(
        self,
        total: Statistics,
        z: Tensor,
        cores: Tensor,
        attended: Tensor | None,
        segments: Segments | None = None,
    ) -> None:
        """Take a layer's part of the forward pass, which will be added to `total`.

        `z`, `cores` and `attended` are those of `static_core.instance_moments`; with `segments` the cores are theirs.
        """
        self._waiting.append(_Pass(total, z, cores, attended, segments))
        self._numbers += z.numel() + cores.numel()
        if self._numbers >= MOST_NUMBERS:
            self.make()

    @torch.no_grad()
    def make(self) -> None:
        """Make the statistics of the layers that wait, and let go of their z and cores."""
        alike: dict[tuple[Any, ...], list[_Pass]] = {}
        for waiting in self._waiting:
            alike.setdefault(waiting.kind, []).append(waiting)
        for passes in alike.values():
            together = max(1, STACKED_NUMBERS // max(1, passes[0].z.numel()))
            with torch.autocast(passes[0].z.device.type, enabled=False), _unseen_by_checkpoints():
                for first in range(0, len(passes), together):
                    self._made += _statistics_of(passes[first : first + together])
        self._waiting, self._numbers = [], 0

    def add(self) -> None:
        """Add the forward pass to the totals, and forget it."""
        self.make()
        while self._made:
            # A layer that has run twice comes up twice, and must not be added to by two at once.
            now = {id(total.usage): (total, made) for total, made in self._made}
            rest = [(total, made) for total, made in self._made if now[id(total.usage)][1] is not made]
            totals, made = zip(*now.values())
            torch._foreach_add_([total.usage for total in totals], [each.usage for each in made])
            torch._foreach_add_(
                [total.moments.view(torch.float64) for total in totals], [each.moments for each in made]
            )
            self._made = rest
