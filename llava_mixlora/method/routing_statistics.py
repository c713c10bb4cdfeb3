"""How evenly the routers use the factors: counts of their choices, and the figures drawn from them.

With u_e the share of all choices of one pool that fell on factor e, E factors in the pool and r chosen at a time:

    entropy  =  -Σ_e u_e ln u_e / ln E        1 when all factors are used alike, ln r / ln E when always the same r are
    dead     =  |{e : u_e = 0}| / E           share of factors that were never chosen
    balance  =  1 / (E Σ_e u_e²)              share of the pool that is in effective use, from r / E to 1

Entropy and balance of a pool that was never used are NaN. The router's own entropy has the same formula with p_e, the
probability that the router gives factor e for one instance: near 1 it is undecided, near 0 it is sure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POOLS = ("A", "B")


def choices(core: Tensor) -> Tensor:
    """How many of B instances chose each factor of pool A and of pool B, read off their cores without waiting.

    `core` [..., B, E, E] → int64 [..., 2, E]. A core that is zero (of lora_alpha = 0) has chosen nothing.
    """
    chosen = core != 0
    return torch.stack([chosen.any(dim=-1), chosen.any(dim=-2)], dim=-3).sum(dim=-2)


def usage_entropy(usage: Tensor) -> Tensor:
    """Entropy of the choices. `usage` [..., E] counts → float64 [...] in [0, 1]."""
    return _normalised_entropy(_shares(usage))


def dead_share(usage: Tensor) -> Tensor:
    """Share of factors never chosen. `usage` [..., E] counts → float64 [...] in [0, 1]."""
    return (usage == 0).double().mean(dim=-1)


def usage_balance(usage: Tensor) -> Tensor:
    """Share of the pool in effective use. `usage` [..., E] counts → float64 [...] in [1 / E, 1]."""
    return 1 / (usage.shape[-1] * _shares(usage).square().sum(dim=-1))


def router_entropy(score: Tensor) -> Tensor:
    """Entropy of what a router gives the factors of each instance. `score` [..., E], non-negative → float64 [...].

    Scores that do not sum to one, such as p_B + p_AB of CFS, are divided by their sum first.
    """
    return _normalised_entropy(_shares(score))


def _shares(weights: Tensor) -> Tensor:
    weights = weights.double()
    return weights / weights.sum(dim=-1, keepdim=True)


def _normalised_entropy(shares: Tensor) -> Tensor:
    if shares.shape[-1] == 1:  # ln 1 = 0: the only factor is as evenly used as it can be
        return shares.squeeze(-1)
    return torch.special.entr(shares).sum(dim=-1) / math.log(shares.shape[-1])
