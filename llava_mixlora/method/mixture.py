"""The mathematics of MixLoRA as pure functions on tensors, in the paper's letters.

Shapes: B instances, S positions, E factors per pool, r chosen factors, d_in and d_out the layer's widths.

    h̄     = mean of x over the routed positions                         [B, d_in]
    p_A    = softmax(R_A h̄),  idx_A = top-r(p_A)                         IFS for A (paper, section 3.2)
    p_B    = softmax(R_B h̄)                                              IFS for B
    p_AB   = softmax(Σ_i softmax(W_AB[i] · a_idx_A[i]))                   CFS (paper, section 3.2)
    idx_B  = top-r(p_B)  or  top-r(p_B + p_AB)
    Δy     = (α / r) Σ_j b_idx_B[j] (a_idx_A[j] · x)  =  ((x Aᵀ) C) B

C is the *core*: an E×E matrix per instance that is α/r at (idx_A[j], idx_B[j]) and zero elsewhere. So the update is a
rank-E LoRA with a tiny per-instance matrix in the middle; no weight is gathered per token and ΔW is never built.

With `pairing="same"` there is one router and one set of factors for both pools, I = top-r(softmax(R h̄)), and

    Δy     = (α / r) Σ_{e∈I} b_e (a_e · x)  =  ((x Aᵀ) diag(c)) B

so C is diagonal and is kept as c, its *gates*, [B, E]: α/r where a factor is chosen and zero elsewhere. Whatever takes
cores takes gates too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Segments


class Route(NamedTuple):
    """What the routers chose for each instance; the j-th A factor pairs with the j-th B factor.

    `index_A`, `index_B`: int64 [B, r], in descending order of score. `score_A`, `score_B`: float32 [B, E], the scores
    that were ranked (p_A; p_B or p_B + p_AB), or None where nothing was scored (`routing="random"`). With
    `pairing="same"` both are the same tensors.
    """

    index_A: Tensor
    index_B: Tensor
    score_A: Tensor | None
    score_B: Tensor | None

    def detach(self) -> Route:
        """The same route without autograd history."""
        scores = (None if score is None else score.detach() for score in (self.score_A, self.score_B))
        return Route(self.index_A, self.index_B, *scores)


def pooled_input(x: Tensor, weights: Tensor | None) -> Tensor:
    """h̄: the average of `x` [B, S, d_in] over positions, in float32 at least, [B, d_in].

    `weights`: [B, S] non-negative rows that sum to one, or None for the plain mean; of several segments in a row
    [B, T, S], for [B, T, d_in].
    """
    if weights is None:
        return x.mean(dim=1, dtype=at_least_float32(x.dtype))
    x = x.to(at_least_float32(x.dtype))
    weights = weights.to(x)  # its layer may be on another device than the model's inputs
    return torch.bmm(weights, x) if weights.ndim == 3 else torch.bmm(weights.unsqueeze(1), x).squeeze(1)


def input_scores(pooled: Tensor, *routers: Tensor) -> Tensor:
    """IFS: softmax(R h̄) over the factors of each of P pools. `pooled` [B, d_in], each router [E, d_in] → [B, P, E]."""
    # Put together after the products: routers put together before would be a copy that autograd keeps.
    logits = [F.linear(pooled, router.to(pooled.dtype)) for router in routers]
    return torch.stack(logits, dim=1).softmax(dim=-1)


def conditional_scores(
    factors_A: Tensor, cfs: Tensor, index_A: Tensor, product: str = "inner", temperature: float = 1.0
) -> Tensor:
    """CFS: p_AB, how well each B factor fits the A factors already chosen, in float32 at least, [B, E].

    `factors_A` [E, d_in], `cfs` (W_AB) [r, E, d_in], `index_A` [B, r]. `product` says how W_AB[i] meets a: `"inner"` is
    the paper's inner product; `"sums"` multiplies their sums over d_in, which is what the einsum of the authors'
    released code computes (`brd,rfe->bre`, two letters where one was meant). What enters a softmax is divided by
    `temperature`.
    """
    dtype = at_least_float32(factors_A.dtype)
    factors_A, cfs = factors_A.to(dtype), cfs.to(dtype)
    if product == "sums":
        logits = factors_A.sum(dim=-1)[index_A.t()].unsqueeze(2) * cfs.sum(dim=-1).unsqueeze(1)  # [r, B, E]
    else:
        # An embedding's backward pass is one kernel, that of an index sorts first.
        logits = torch.bmm(F.embedding(index_A.t(), factors_A), cfs.transpose(1, 2))  # [r, B, E]
    return _twice_softmaxed(logits, temperature)


def conditional_table(factors_A: Tensor, cfs: Tensor, product: str = "inner") -> Tensor:
    """T[i, a, b], all of W_AB that routes depend on: how B factor b fits A factor a in place i, [r, E, E].

    The arguments are those of [`conditional_scores`]; in float32 at least.
    """
    dtype = at_least_float32(factors_A.dtype)
    factors_A, cfs = factors_A.to(dtype), cfs.to(dtype)
    if product == "sums":
        return factors_A.sum(dim=-1).unsqueeze(1) * cfs.sum(dim=-1).unsqueeze(1)
    return torch.matmul(factors_A, cfs.transpose(1, 2))


def conditional_scores_by_table(table: Tensor, index_A: Tensor, temperature: float = 1.0) -> Tensor:
    """[`conditional_scores`] from the [`conditional_table`] [r, E, E]; `index_A` [B, r] → [B, E]."""
    places = torch.arange(len(table), device=table.device).unsqueeze(1)
    return _twice_softmaxed(table.to(at_least_float32(table.dtype))[places, index_A.t()], temperature)


def _twice_softmaxed(logits: Tensor, temperature: float) -> Tensor:
    """softmax(Σ_i softmax(logits[i])), [r, B, E] → [B, E]; what enters either softmax is divided by `temperature`."""
    if temperature == 1:
        return logits.softmax(dim=-1).sum(dim=0).softmax(dim=-1)
    return ((logits / temperature).softmax(dim=-1).sum(dim=0) / temperature).softmax(dim=-1)


def route_by_input(
    pooled: Tensor,
    router_A: Tensor,
    router_B: Tensor | None,
    r: int,
    conditional: Callable[[Tensor], Tensor] | None = None,
) -> Route:
    """Choose `r` factors of each pool: IFS when `conditional` is None, else IFS for A and IFS+CFS for B.

    `pooled` [B, d_in]; `router_A` and `router_B` [E, d_in], the latter None with `pairing="same"`; `conditional` makes
    p_AB [B, E] of the A factors chosen, idx_A [B, r].
    """
    scores = input_scores(pooled, *([router_A] if router_B is None else [router_A, router_B]))
    if conditional is None:
        return route_by_scores(scores, r)
    score_A, score_B = scores.unbind(1)
    index_A = score_A.topk(r, dim=-1).indices
    score_B = score_B + conditional(index_A)
    return Route(index_A, score_B.topk(r, dim=-1).indices, score_A, score_B)


def route_by_scores(scores: Tensor, r: int, index: Tensor | None = None) -> Route:
    """The `r` factors of the highest `scores` [B, P, E], P = 1 for both pools; or the factors `index` [B, r]."""
    by_pool = scores.unbind(1)
    chosen = (index,) if index is not None else scores.topk(r, dim=-1).indices.unbind(1)
    return Route(chosen[0], chosen[-1], by_pool[0], by_pool[-1])


def route_at_random(
    instances: int,
    num_factors: int,
    r: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    pairing: str = "rank",
) -> Route:
    """Draw `r` distinct factors of each pool for every instance, uniformly; [instances, r] each."""
    noise = torch.rand(2, instances, num_factors, generator=generator, device=generator.device if generator else device)
    index_A, index_B = noise.to(device).topk(r, dim=-1).indices
    return Route(index_A, index_A if pairing == "same" else index_B, None, None)


def core(route: Route, num_factors: int, scaling: float, straight_through: bool, dtype: torch.dtype) -> Tensor:
    """The per-instance core C, [B, E, E]: `scaling` at (index_A[j], index_B[j]), zero elsewhere.

    With `straight_through` each entry is multiplied by g_A[j]·g_B[j], g = 1 + (p − stop_grad(p)): one in value, while
    its gradient reaches the routers through the scores p of the chosen factors.
    """
    cells = route.index_A * num_factors + route.index_B  # [B, r]
    empty = torch.zeros(len(cells), num_factors * num_factors, dtype=dtype, device=cells.device)
    if straight_through and route.score_A is not None and torch.is_grad_enabled():
        # Where both gates are one, their product has the derivatives of 1 + p_A + p_B, in half as many operations.
        p = route.score_A.gather(1, route.index_A) + route.score_B.gather(1, route.index_B)
        flat = empty.scatter(1, cells, ((p - p.detach()) * scaling + scaling).to(dtype))
    else:
        flat = empty.scatter_(1, cells, scaling)
    return flat.view(-1, num_factors, num_factors)


def gates(route: Route, num_factors: int, scaling: float, straight_through: bool, dtype: torch.dtype) -> Tensor:
    """The diagonal c of the core of a route with `pairing="same"`, [B, E]: `scaling` at the chosen factors, else zero.

    With `straight_through` each is multiplied by g = 1 + (p − stop_grad(p)), as in [`core`].
    """
    index = route.index_A
    empty = torch.zeros(len(index), num_factors, dtype=dtype, device=index.device)
    if straight_through and route.score_A is not None and torch.is_grad_enabled():
        p = route.score_A.gather(1, index)
        return empty.scatter(1, index, ((p - p.detach()) * scaling + scaling).to(dtype))
    return empty.scatter_(1, index, scaling)


def full_core(core: Tensor, dims: int = 2) -> Tensor:
    """Cores [B, E, E] as they are; of gates [B, E], or of as many as `dims` dimensions, the diagonal matrices."""
    return torch.diag_embed(core) if core.ndim == dims else core


def low_rank_update(x: Tensor, factors_A: Tensor, factors_B: Tensor, core: Tensor) -> Tensor:
    """Δy = ((x Aᵀ) C) B. `x` [B, S, d_in], `factors_A` [E, d_in], `factors_B` [E, d_out].

    `core` [B, E, E], or its [`gates`] [B, E] where it is diagonal.
    """
    return torch.matmul(coefficients_of(F.linear(x, factors_A), core), factors_B)


def coefficients_of(z: Tensor, core: Tensor, segments: Segments | None = None) -> Tensor:
    """z C, [B, S, E], from z = x Aᵀ [B, S, E] and cores [B, E, E], or gates [B, E]; those of `segments` [G, ...]."""
    if segments is not None:
        return segments.apply(z, core)
    return z * core.unsqueeze(1) if core.ndim == 2 else torch.bmm(z, core)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Routers never run below float32 (softmax and top-r are sensitive), and stay in float64 where x is."""
    return promoted(dtype, torch.float32)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of x; entering its context costs more than asking for it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """`torch.promote_types`, which goes through PyTorch's dispatcher also where both are the same."""
    return one if one == other else torch.promote_types(one, other)
