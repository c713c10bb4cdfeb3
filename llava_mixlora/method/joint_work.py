"""What several layers of one training forward pass compute in one operation: their routes, and their z C.

Layers that are routed by the same tensor (all of a block by words; q, k and v by a hidden state) have their routers put
one below the other, and so have the pools A of layers that are given the same input:

    p   = softmax([R_1; R_2; ...] h̄)        for L layers at once: L times fewer operations, which are tiny
    z C = (x [A_1; A_2; ...]ᵀ) · [c_1, c_2, ...]

The numbers are those that each layer computes by itself, up to rounding. Inference does not do so: the routes of
a prompt shall be the same, to the bit, whoever asks for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .companions import Runs, companions_of, works_separately
from .mixture import Route, coefficients_of, core, gates, route_by_scores
from .recomputation import part_of_graph
from .router_loss import weighted_term
from .segments import Segments

_PLAIN = (nn.Parameter, Tensor)


class Run:
    """n layers that are given the same tensor, and their gates [G, n·E]; or one layer and its cores [G, E, E]."""

    def __init__(self, layers: Sequence[Any], adapter: str, cores: Tensor) -> None:
        self.layers, self.adapter, self.cores = layers, adapter, cores
        self._made: list[tuple[Tensor, Tensor] | None] = []
        self._made_of: tuple[weakref.ref[Tensor], Hashable] | None = None

    def cores_of(self, place: int) -> Tensor:
        """Of one layer: [G, E, E], or [G, E]."""
        return self.cores if len(self.layers) == 1 else self.cores.chunk(len(self.layers), dim=-1)[place]

    def coefficients(
        self, place: int, given: Tensor, sequence: Tensor, segments: Segments | None
    ) -> tuple[Tensor, Tensor] | None:
        """z (without a gradient) and z C of a layer, [B, S, E] each; None where it is given another tensor.

        `sequence` [B, S, d_in] is what the layers make of what they are `given`.
        """
        state = given._version, part_of_graph()
        if self._made_of is None:
            pools = [layer.mixlora_A[self.adapter] for layer in self.layers]
            if not _are_whole(pools, sequence.device):
                return None
            z = F.linear(sequence, torch.cat(pools))
            products = coefficients_of(z, self.cores, segments)
            if torch.is_autocast_enabled(z.device.type):
                products = products.to(z.dtype)  # here for all, and not for each when it meets its pool B
            n = len(self.layers)
            self._made = [*zip(z.detach().chunk(n, dim=-1), products.chunk(n, dim=-1))]
            self._made_of = weakref.ref(given), state
        if self._made_of[0]() is not given or self._made_of[1] != state:
            return None
        made, self._made[place] = self._made[place], None
        return made


class Share(NamedTuple):
    """A layer's part of what was made for several, or for it alone.

    Its route and its cores [G, E, E], or gates [G, E], without a gradient; its place in a run of layers, whose cores
    have theirs; its [`weighted_term`] of the loss.
    """

    route: Route
    cores: Tensor
    run: Run
    place: int
    term: Tensor | None


@dataclass(frozen=True)
class Together:
    """What was made of `pooled` for layers that have not asked for it yet, in one part of the autograd graph."""

    waiting: dict[nn.Module, Share]
    pooled: Tensor
    segments: Segments | None
    by_words: bool
    dtype: torch.dtype  # of the cores
    kind: Hashable  # of what the first of the layers was given
    part: Hashable

    def is_of(self, pooled: Tensor, dtype: torch.dtype) -> bool:
        """Whether it was made of `pooled`, for cores of this dtype, within what runs now."""
        return self.pooled is pooled and self.dtype == dtype and self.part == part_of_graph()

    def goes_for(self, x: Tensor) -> bool:
        """Whether a layer that gets x [B, S, d_in] would be routed by the same words, now."""
        return self.by_words and self.kind == _kind(x) and self.part == part_of_graph()


def work_together(
    layer: Any,
    root: nn.Module | None,
    adapter: str,
    x: Tensor,
    pooled: Tensor,
    index: Tensor | None,
    dtype: torch.dtype,
    segments: Segments | None,
) -> Together | None:
    """Make routes and cores for a layer and its companions; None where it has none, or is to work by itself.

    Args:
        layer: of the adapted model `root`.
        x: what it is given, [B, S, d_in].
        pooled: what routers see, [G, d], of the `segments` where rows have several.
        index: int64 [G, r], the factors that were chosen without routers; None where these choose.
        dtype: of the cores.
    """
    settings = layer.settings[adapter]
    if works_separately() or settings.routing != "ifs":
        return None
    runs = companions_of(layer, adapter, root)
    if runs is None:
        return None
    routers = [router[adapter] for run in runs for each in run for router in each.routers(adapter)]
    if not _are_whole(routers, pooled.device):
        return None
    waiting = _routed(runs, adapter, pooled, routers, index, dtype)
    by_words = settings.router_width is not None
    return Together(waiting, pooled, segments, by_words, dtype, _kind(x), part_of_graph())


def _kind(x: Tensor) -> Hashable:
    return x.shape[:2], x.dtype, x.device


def _routed(
    runs: Runs, adapter: str, pooled: Tensor, routers: list[Tensor], index: Tensor | None, dtype: torch.dtype
) -> dict[nn.Module, Share]:
    layers = [layer for run in runs for layer in run]
    settings = layers[0].settings[adapter]
    is_diagonal = settings.pairing == "same"
    if not is_diagonal or not isinstance(layers[0].mixlora_dropout[adapter], nn.Identity):
        runs = tuple((layer,) for layer in layers)  # no one product: a core for each, or each drops something else
    G, L, E = pooled.shape[0], len(layers), settings.num_factors
    logits = F.linear(pooled, torch.cat(routers).to(pooled.dtype))
    index = None if index is None else index.repeat_interleave(L, dim=0)
    route = route_by_scores(logits.view(G * L, len(routers) // L, E).softmax(dim=-1), settings.r, index)
    cores = (gates if is_diagonal else core)(route, E, settings.scaling, settings.straight_through, dtype)
    cores = cores.view(G, L, *cores.shape[1:])
    shares = cores.split([len(run) for run in runs], dim=1)
    shares = [share.flatten(1) if is_diagonal else share.squeeze(1) for share in shares]
    made = [Run(run, adapter, share) for run, share in zip(runs, shares)]
    places = [(run, place) for run in made for place in range(len(run.layers))]
    by_layer = Route(*(part.view(G, L, -1).transpose(0, 1) for part in route))
    terms = weighted_term(by_layer, settings) if G else None
    terms = [None] * L if terms is None else terms.unbind(0)
    routes = zip(*(part.unbind(0) for part in by_layer.detach()))
    of_layers = zip(layers, routes, cores.detach().unbind(1), places, terms)
    return {layer: Share(Route(*each), own, *place, term) for layer, each, own, place, term in of_layers}


def _are_whole(parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Whether parameters are all there, on the device: not spread over processes (FSDP, ZeRO-3), nor sent away."""
    shape, dtype = parameters[0].shape, parameters[0].dtype
    return len(shape) == 2 and all(
        type(each) in _PLAIN
        and each.shape == shape
        and each.dtype == dtype
        and each.device == device
        and not hasattr(each, "ds_id")
        for each in parameters
    )
