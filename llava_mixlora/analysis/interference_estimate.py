"""How strongly tasks interfere, estimated from the inner products of their mini-batches' gradients.

A step of length λ on a batch x_j of task j lowers the loss of a batch x_i of task i, to first order in λ, by λ times

    gain(x_i, x_j) = ⟨∇L_i(x_i), ∇L_j(x_j) / ‖∇L_j(x_j)‖⟩ ,

so the Gram matrix of the gradients holds all gains, and λ drops out of their ratios (Shen et al., 2024).
A batch is never paired with itself: a step on x_i always helps x_i, by the noise of that one gradient, which would be
most of Δ_i L_i. With Δ_j L_i(x_i) = E over x_j of gain(x_i, x_j), the ratio can be taken in two ways:

    mean of ratios:  I_ij = E over x_i of [Δ_j L_i(x_i) / Δ_i L_i(x_i)]      as the paper writes it
    ratio of means:  I_ij = E over x_i of Δ_j L_i(x_i) / E over x_i of Δ_i L_i(x_i)

The first has no finite mean where Δ_i L_i(x_i) comes near zero for some x_i: one batch then decides. The second asks
what a step on j does to i's expected loss, and needs only i's own expected gain to be above zero; so it is the default.
Where batches are so large that all x_i give about the same gains, both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATIO_OF_MEANS, MEAN_OF_RATIOS = ESTIMATORS = ("ratio-of-means", "mean-of-ratios")
FEWEST_BATCHES = 3
"""Of a task: one is left out at a time (the jackknife), and two must remain to make steps on each other."""
MEASURABLE = 2.0
"""In standard errors: how far a task's own expected gain must be above zero for others to be measured by it."""


@dataclass(frozen=True)
class Estimate:
    """Interference of T tasks, float64 [T, T]: row i, whose loss changes; column j, on which the step is made.

    Args:
        interference: I_ij by the chosen estimator; 1 on the diagonal. NaN in rows of tasks that are not measurable.
        error: standard errors of `interference`.
        gains: the mean of gain(x_i, x_j): how fast i's loss falls with the length of a step on j.
        gain_errors: standard errors of `gains`.
        measurable: bool [T], whether a task's own gain stands out from zero by [`MEASURABLE`].
        from_others: float64 [T], the sum of I_ij over the other tasks j: what a step on each of them does to i.
            -1: they undo i's own step; 0: nothing; T - 1: each is as good as i's own. NaN as in `interference`.
        from_others_error: standard errors of `from_others`.
        mean_from_others: of the measurable tasks; NaN when there are none.
        mean_from_others_error: its standard error.
        halves_correlation: of the entries beside the diagonal in one half of the batches with those in the other; NaN
            when there are fewer than four batches of a task, or fewer than two measurable entries.
    """

    interference: Tensor
    error: Tensor
    gains: Tensor
    gain_errors: Tensor
    measurable: Tensor
    from_others: Tensor
    from_others_error: Tensor
    mean_from_others: float
    mean_from_others_error: float
    halves_correlation: float

    def others(self) -> tuple[Tensor, Tensor]:
        """The measurable entries beside the diagonal, and their standard errors."""
        beside = _beside_diagonal(self.measurable)
        return self.interference[beside], self.error[beside]


def estimate(gram: Tensor, estimator: str = RATIO_OF_MEANS) -> Estimate:
    """Interference of T tasks, with standard errors by the jackknife over batches.

    Args:
        gram: [T, K, T, K], the inner products of the gradients of K batches of each task, which share no sample; K is
            [`FEWEST_BATCHES`] at least.
        estimator: of [`ESTIMATORS`].
    """
    T, K = gram.shape[:2]
    pairs = batch_gains(gram)
    ratio = ratio_of_means if estimator == RATIO_OF_MEANS else mean_of_ratios
    everything = torch.ones(T, K, dtype=torch.float64)
    all_but_one = (1 - torch.eye(T * K, dtype=torch.float64)).view(T, K, T, K)
    gains, gain_errors = mean_gains(pairs, everything), _jackknife(mean_gains(pairs, all_but_one))
    measurable = gains.diagonal() > MEASURABLE * gain_errors.diagonal()
    unknown = ~measurable.unsqueeze(1)
    first_half = (torch.arange(K) % 2 == 0).double().expand(T, K)
    halves = [ratio(pairs, half) for half in (first_half, 1 - first_half)]
    interference, without_one = ratio(pairs, everything), ratio(pairs, all_but_one)
    # Entries of a row share the batches whose loss changes, so the error of their sum is not that of the entries.
    sums, sums_without_one = (found.sum(dim=-1) - 1 for found in (interference, without_one))
    return Estimate(
        interference=interference.masked_fill(unknown, torch.nan),
        error=_jackknife(without_one).masked_fill(unknown, torch.nan),
        gains=gains,
        gain_errors=gain_errors,
        measurable=measurable,
        from_others=sums.masked_fill(~measurable, torch.nan),
        from_others_error=_jackknife(sums_without_one).masked_fill(~measurable, torch.nan),
        mean_from_others=float(sums[measurable].mean()),
        mean_from_others_error=float(_jackknife(sums_without_one[..., measurable].mean(dim=-1))),
        halves_correlation=_correlation(*(half[_beside_diagonal(measurable)] for half in halves)),
    )


def batch_gains(gram: Tensor) -> Tensor:
    """gain(x_i, x_j) of all pairs, float64 [T, K, T, K]; 0 for a batch with itself, and where ∇L_j(x_j) is zero."""
    T, K = gram.shape[:2]
    flat = gram.double().reshape(T * K, T * K)
    norms = flat.diagonal().sqrt()
    return torch.where(norms > 0, flat / norms, 0.0).fill_diagonal_(0).view(T, K, T, K)


def mean_gains(pairs: Tensor, counted: Tensor) -> Tensor:
    """The mean of `pairs` [T, K, T, K] over pairs of batches, float64 [..., T, T].

    `counted` [..., T, K] is 1 for batches that take part and 0 for others, here and below.
    """
    return torch.einsum("...ib,...ibj->...ij", counted / counted.sum(-1, keepdim=True), _gains_of(pairs, counted))


def ratio_of_means(pairs: Tensor, counted: Tensor) -> Tensor:
    """E over x_i of Δ_j L_i(x_i) / E over x_i of Δ_i L_i(x_i), [..., T, T]; see [`mean_gains`]."""
    gains = mean_gains(pairs, counted)
    return gains / gains.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def mean_of_ratios(pairs: Tensor, counted: Tensor) -> Tensor:
    """E over x_i of [Δ_j L_i(x_i) / Δ_i L_i(x_i)], [..., T, T]; see [`mean_gains`]."""
    gains = _gains_of(pairs, counted)
    ratios = gains / gains.diagonal(dim1=-3, dim2=-1).transpose(-2, -1).unsqueeze(-1)
    ratios = torch.where(counted.unsqueeze(-1) > 0, ratios, 0.0)
    return ratios.sum(dim=-2) / counted.sum(dim=-1, keepdim=True)


def _gains_of(pairs: Tensor, counted: Tensor) -> Tensor:
    """Δ_j L_i(x_i), [..., T, K, T]: for each batch x_i the mean gain from steps on the other counted batches of j."""
    T = len(pairs)
    steps = counted.sum(dim=-1)[..., None, None, :].expand(*counted.shape, T)
    own = torch.eye(T, dtype=pairs.dtype).unsqueeze(1) * counted.unsqueeze(-1)
    return torch.einsum("ibjc,...jc->...ibj", pairs, counted) / (steps - own)


def _beside_diagonal(measurable: Tensor) -> Tensor:
    return measurable.unsqueeze(1) & ~torch.eye(len(measurable), dtype=torch.bool)


def _jackknife(without: Tensor) -> Tensor:
    """Standard errors [...] from the values [T, K, ...] that leave one of K batches of one of T tasks out."""
    K = without.shape[1]
    deviations = without - without.mean(dim=1, keepdim=True)
    return (deviations.square().sum(dim=(0, 1)) * (K - 1) / K).sqrt()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1]) if len(a) > 1 else float("nan")
