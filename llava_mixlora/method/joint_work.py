"""What several layers of one training forward pass compute in one operation: their routes, and their zA·C.

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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .companions import companions_of, works_separately
from .mixture import Route, coefficients_of, core, gates, route_by_scores
from .recomputation import part_of_graph
from .router_loss import weighted_term
from .segments import Segments


class Run:
    """n layers that are given the same tensor, and their gates [G, n·E]; or one layer and its cores [G, E, E]."""

    def __init__(self, layers: Sequence[Any], adapter: str, cores: Tensor) -> None:
        self.layers, self.adapter, self.cores = layers, adapter, cores
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}
        self._made_of: tuple[weakref.ref[Tensor], Hashable] | None = None

    def cores_of(self, place: int) -> Tensor:
        """Of one layer: [G, E, E], or [G, E]."""
        if len(self.layers) == 1:
            return self.cores
        return self.cores.unflatten(-1, (len(self.layers), -1)).select(1, place)

    def coefficients(
        self, place: int, given: Tensor, sequence: Tensor, segments: Segments | None
    ) -> tuple[Tensor, Tensor] | None:
        """z (without a gradient) and z C of a layer, [B, S, E] each; None where it is given another tensor.

        `sequence` [B, S, d_in] is what the layers make of what they are `given`.
        """
        made_of = weakref.ref(given), (given._version, part_of_graph())
        if self._made_of is None:
            factors_A = torch.cat([layer.mixlora_A[self.adapter] for layer in self.layers])
            z = F.linear(sequence, factors_A)
            products = coefficients_of(z, self.cores, segments)
            if torch.is_autocast_enabled(z.device.type):
                products = products.to(z.dtype)  # here for all, and not for each when it meets its pool B
            shape = len(self.layers), -1
            parts = zip(z.detach().unflatten(-1, shape).unbind(-2), products.unflatten(-1, shape).unbind(-2))
            self._made, self._made_of = dict(enumerate(parts)), made_of
        if self._made_of[0]() is not given or self._made_of[1] != made_of[1]:
            return None
        return self._made.pop(place, None)


class Share(NamedTuple):
    """A layer's route, its place in a run of layers, and its [`weighted_term`] of the loss where that was made too."""

    route: Route
    run: Run
    place: int
    term: Tensor | None = None


class Together(NamedTuple):
    """What was made of `pooled`, under `key`, for layers that have not asked for it yet."""

    pooled: Tensor
    key: Hashable
    waiting: dict[nn.Module, Share]


def take(
    known: Together | None,
    layer: Any,
    root: nn.Module | None,
    adapter: str,
    pooled: Tensor,
    index: Tensor | None,
    dtype: torch.dtype,
) -> Together | None:
    """What holds the share of `layer` in what was made for it and its companions; None where it works by itself.

    Args:
        known: what was made last in the forward pass of the adapted model `root`; made anew where it does not fit.
        pooled: what routers see, [G, d].
        index: int64 [G, r], the factors that were chosen without routers; None where these choose.
        dtype: of the cores.
    """
    key = adapter, index is None, pooled.requires_grad, dtype, part_of_graph()
    if known is not None and known.pooled is pooled and known.key == key and layer in known.waiting:
        return known
    settings = layer.settings[adapter]
    if works_separately() or settings.routing != "ifs":
        return None
    companions = companions_of(layer, root)
    if companions is None:
        return None
    by_words = settings.router_width is not None
    runs = [[each for each in run if _fits(each, layer, adapter)] for run in companions.block]
    runs = [run for run in runs if run and (by_words or layer in run)]
    if sum(map(len, runs)) < 2 or not any(layer in run for run in runs):
        return None
    runs = [part for run in runs for part in ([run] if _share_product(run, adapter) else [[each] for each in run])]
    return Together(pooled, key, _routed(runs, adapter, pooled, index, dtype))


def _routed(
    runs: Sequence[Sequence[Any]], adapter: str, pooled: Tensor, index: Tensor | None, dtype: torch.dtype
) -> dict[nn.Module, Share]:
    layers = [layer for run in runs for layer in run]
    settings = layers[0].settings[adapter]
    G, L, E = len(pooled), len(layers), settings.num_factors
    pools = [router[adapter] for layer in layers for router in layer.routers(adapter)]
    logits = F.linear(pooled, torch.cat(pools).to(pooled.dtype))
    route = route_by_scores(logits.view(G * L, len(pools) // L, E).softmax(dim=-1), settings.r, _of_all(index, L))
    make = gates if settings.pairing == "same" else core
    cores = make(route, E, settings.scaling, settings.straight_through, dtype)
    shares = cores.view(G, L, *cores.shape[1:]).split([len(run) for run in runs], dim=1)
    made = [
        Run(run, adapter, share.flatten(1) if settings.pairing == "same" else share.squeeze(1))
        for run, share in zip(runs, shares)
    ]
    places = [(run, place) for run in made for place in range(len(run.layers))]
    by_layer = [part.view(G, L, -1).transpose(0, 1) for part in route]
    terms = weighted_term(Route(*by_layer), settings)
    routes = zip(*(part.unbind(0) for part in by_layer))
    terms = [None] * L if terms is None else terms.unbind(0)
    return {
        layer: Share(Route(*of_layer), *place, term)
        for layer, of_layer, place, term in zip(layers, routes, places, terms)
    }


def _of_all(index: Tensor | None, layers: int) -> Tensor | None:
    return None if index is None else index.repeat_interleave(layers, dim=0)


def _fits(other: Any, layer: Any, adapter: str) -> bool:
    """Whether what routes `layer` could route `other` too, with routers that lie here, whole."""
    if other is layer:
        return all(_is_whole(router[adapter]) for router in layer.routers(adapter))
    if adapter not in other.mixlora_A or other.settings[adapter] != layer.settings[adapter]:
        return False
    if not other.training or other.disable_adapters or other.merged:
        return False
    pairs = zip(other.routers(adapter), layer.routers(adapter))
    return all(_is_whole(of[adapter]) and _alike(of[adapter], like[adapter]) for of, like in pairs)


def _share_product(run: Sequence[Any], adapter: str) -> bool:
    """Whether one product makes z C of all layers of a run: with gates, of an input of which each drops nothing."""
    if run[0].settings[adapter].pairing != "same":
        return False
    pools = [layer.mixlora_A[adapter] for layer in run]
    undropped = all(isinstance(layer.mixlora_dropout[adapter], nn.Identity) for layer in run)
    return undropped and all(_is_whole(pool) and _alike(pool, pools[0]) for pool in pools)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _is_whole(parameter: Tensor) -> bool:
    """Whether a parameter is all there: not spread over processes (FSDP, DeepSpeed ZeRO-3), nor sent away."""
    is_plain = type(parameter) in (nn.Parameter, Tensor) and parameter.ndim == 2 and not parameter.is_meta
    return is_plain and not hasattr(parameter, "ds_id")
