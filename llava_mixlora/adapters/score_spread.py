"""How far CFS's scores are spread beside those of IFS: whether they can decide which B factors a layer chooses.

B factors are ranked by p_B + p_AB. A term whose scores hardly differ decides next to nothing. Scores need inputs, of
which a saved adapter has none, so they are those of a stated reference: [`INPUTS`] random vectors of unit root mean
square as what routers average, and for each of them r A factors at random.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..method.config import MixLoraConfig
from ..method.mixture import conditional_scores_by_table, conditional_table, input_scores, route_at_random

INPUTS, SEED = 256, 0


class ScoreSpread(NamedTuple):
    """Standard deviations of p_B and p_AB, as root mean squares over what they are not taken over.

    `ifs_factors`, `cfs_factors`: over the B factors, for one input or one choice of A factors, which is what ranks
    them. `ifs_inputs`, `cfs_choices`: of one factor's score, over the inputs or over the choices of A factors.
    """

    ifs_factors: float
    ifs_inputs: float
    cfs_factors: float
    cfs_choices: float


@torch.no_grad()
def score_spread(config: MixLoraConfig, factors_A: Tensor, router_B: Tensor, cfs: Tensor) -> ScoreSpread:
    """The spread in one layer of an adapter with `routing="ifs_cfs"`, the same at every call.

    `factors_A` [E, d_in]; `router_B` [E, width]; `cfs` [r, E, d_in], or [r, E, E] with `cfs="table"`.
    """
    generator = torch.Generator().manual_seed(SEED)
    pooled = torch.randn(INPUTS, router_B.shape[1], generator=generator)
    pooled = pooled / pooled.square().mean(dim=1, keepdim=True).sqrt()
    r, E = cfs.shape[:2]
    chosen = route_at_random(INPUTS, E, r, pooled.device, generator).index_A
    table = cfs if config.cfs == "table" else conditional_table(factors_A, cfs, config.cfs_product)
    p_B = input_scores(pooled, router_B).squeeze(1)
    p_AB = conditional_scores_by_table(table, chosen, config.cfs_temperature)
    return ScoreSpread(*(_deviation(scores, dim) for scores in (p_B, p_AB) for dim in (1, 0)))


def _deviation(scores: Tensor, dim: int) -> float:
    return float(scores.double().var(dim=dim, correction=0).mean().sqrt())
