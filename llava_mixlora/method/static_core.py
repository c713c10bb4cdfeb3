"""The best static stand-ins for an update that depends on the input, as pure functions on tensors.

An adapter's update of position x of instance b is Δy = z C_b B with z = x Aᵀ: x [d_in], A [E, d_in], C_b [E, E],
B [E, d_out]. A checkpoint without routers can only hold Δy = x W B with one W [d_in, E] for every input:

    mean        W = Aᵀ M,  M = E[C]                                over instances
    lstsq       W = Aᵀ M,  M = argmin Σ ‖z (C − M) B‖²             over positions
    regression  W = argmin Σ ‖(z C − x W) B‖²                      over positions; any input direction, still rank E

What they are made from are sums over positions (C over instances): [`Moments`] is all that `mean` and `lstsq` need.

**B drops out.** Setting the derivative of Σ ‖z (C − M) B‖² to zero gives G M B Bᵀ = H B Bᵀ with G = Σ zᵀz, H = Σ zᵀz C.
Every M with G M = H solves that whatever B is, and the sum is convex in M, so M is a minimiser even where the rows of B
are linearly dependent (they then have further ones). G M = H has solutions: each term zᵀz C lies in the range of its
zᵀz, and the range of a sum of positive semidefinite matrices contains that of each. The same holds for `regression`
with Σ xᵀx and Σ xᵀz C.

**Which minimiser.** Directions that never occurred leave M free. There `lstsq` stays with the mean, and `regression`
with `lstsq`: M = E[C] + G⁺ (H − G E[C]). So where all routes are equal every method is exact, on any input, and on the
data that the sums are of, regression is never worse than lstsq, nor lstsq than mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("mean", "lstsq", "regression")
RANK_TOLERANCE = 1e-8
"""Directions of G whose share of its largest eigenvalue is below this count as never seen: products are float32."""
RIDGE = 1e-6
"""`regression` pulls W towards `lstsq` by this share of the mean squared input, which keeps it well-conditioned."""


class Moments(NamedTuple):
    """Sums, [E, E] each: Σ C over instances; G = Σ zᵀz, H = Σ zᵀz C and Σ (zC)ᵀ zC over positions."""

    core: Tensor
    gram: Tensor
    cross: Tensor
    power: Tensor


class InputMoments(NamedTuple):
    """Sums over a layer's positions that `regression` needs beyond [`Moments`].

    `second` [d_in, d_in] = Σ xᵀx; `cross` [d_in, E] = Σ xᵀ z C.
    """

    second: Tensor
    cross: Tensor


def instance_moments(z: Tensor, core: Tensor, attended: Tensor | None = None) -> Tensor:
    """The [`Moments`] of one forward pass, in float64, [4, E, E].

    `z` [B, S, E], `core` [B, E, E]; `attended` bool [B, S], False at padding, which does not count; None: no padding.
    Those of one instance are made in float32 at least, sums over instances in float64.
    """
    return summed_moments(instance_grams(z, attended), core)


def instance_grams(z: Tensor, attended: Tensor | None = None) -> Tensor:
    """Σ zᵀz over the positions of each instance, [..., B, E, E] in float32 at least.

    `z` [..., B, S, E], the dimensions in front are those of [`summed_moments`]; `attended` as in [`instance_moments`].
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if attended is not None:
        z = z * attended.unsqueeze(-1)
    return torch.matmul(z.mT, z)


def summed_moments(gram: Tensor, core: Tensor) -> Tensor:
    """The [`Moments`] of instances in float64, [..., 4, E, E], from `gram` of [`instance_grams`] and `core`.

    Both are [..., B, E, E]; the dimensions in front, such as layers, stay.
    """
    core = core.to(gram.dtype)
    cross = gram @ core
    power = core.mT @ cross
    return torch.stack([part.sum(dim=-3, dtype=torch.float64) for part in (core, gram, cross, power)], dim=-3)


def instance_input_moments(x: Tensor, z: Tensor, core: Tensor, attended: Tensor | None = None) -> InputMoments:
    """The [`InputMoments`] of one forward pass, in float64; shapes and dtypes as in [`instance_moments`]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, coefficients = x.to(dtype), torch.bmm(z.to(dtype), core.to(dtype))
    if attended is not None:
        x = x * attended.unsqueeze(-1)
    x = x.flatten(0, 1)
    return InputMoments((x.t() @ x).double(), (x.t() @ coefficients.flatten(0, 1)).double())


def mean_core(moments: Moments, entries: float) -> Tensor:
    """E[C] over instances, [E, E]; `entries` is the sum of all entries of one core, r times the layer's scaling."""
    return moments.core * (entries / moments.core.sum())


def lstsq_core(moments: Moments, entries: float) -> Tensor:
    """The minimiser M of Σ ‖z (C − M) B‖² that is nearest to the mean core, [E, E]; `entries` as in [`mean_core`]."""
    mean = mean_core(moments, entries)
    inverse = torch.linalg.pinv(moments.gram, rtol=RANK_TOLERANCE, hermitian=True)
    return mean + inverse @ (moments.cross - moments.gram @ mean)


def regression_map(inputs: InputMoments, factors_A: Tensor, core: Tensor) -> Tensor:
    """The minimiser W of Σ ‖(zC − xW) B‖² near Aᵀ M, [d_in, E]. `factors_A` [E, d_in]; `core` is M of [`lstsq_core`].

    With R = K − S Aᵀ M (S, K the sums) it is Aᵀ M + D, (S + λ) D = R. Its error is that of Aᵀ M less
    ‖(S + 2λ)^½ D B‖² ≥ 0, so it is no larger for any λ, nor for any B.
    """
    start = factors_A.to(core.dtype).t() @ core
    residual = inputs.cross - inputs.second @ start
    width = len(inputs.second)
    ridge = RIDGE * inputs.second.diagonal().sum() / width
    identity = torch.eye(width, dtype=core.dtype, device=core.device)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(inputs.second + ridge * identity)
        if not failed:
            return start + torch.cholesky_solve(residual, factor)
        ridge = 10 * ridge  # sums made in float32 are positive semidefinite up to their rounding only
    return start


def squared_error(moments: Moments, factors_B: Tensor, core: Tensor) -> Tensor:
    """Σ ‖z (C − M) B‖² over the positions that were summed. `factors_B` [E, d_out], `core` M [E, E]."""
    error = moments.power - core.t() @ moments.cross - moments.cross.t() @ core + core.t() @ moments.gram @ core
    return _traced(error, factors_B)


def squared_error_of_map(power: Tensor, inputs: InputMoments, factors_B: Tensor, weight: Tensor) -> Tensor:
    """Σ ‖(zC − xW) B‖² over the positions that were summed. `power` as in [`Moments`], `weight` W [d_in, E]."""
    cross = weight.t() @ inputs.cross
    return _traced(power - cross - cross.t() + weight.t() @ inputs.second @ weight, factors_B)


def squared_norm(moments: Moments, factors_B: Tensor) -> Tensor:
    """Σ ‖z C B‖², what the errors are relative to."""
    return _traced(moments.power, factors_B)


def low_rank_pair(factors_A: Tensor, factors_B: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """x Aᵀ M B as a LoRA's two matrices, in float32 at least: down [E, d_in] = A, up [d_out, E] = (M B)ᵀ."""
    dtype = torch.promote_types(factors_B.dtype, torch.float32)
    return factors_A.to(dtype), (core.to(factors_B.device) @ factors_B.to(core.dtype)).t().to(dtype).contiguous()


def _traced(matrix: Tensor, factors_B: Tensor) -> Tensor:
    """tr(Bᵀ matrix B), at least zero."""
    factors_B = factors_B.to(matrix.dtype)
    return (factors_B * (matrix @ factors_B)).sum().clamp(min=0)
