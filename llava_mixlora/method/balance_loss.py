"""The optional load-balancing term (`balance_loss_weight`), and how it joins the loss.

For one pool of one layer, with f_e the share of the batch's choices that fell on factor e (a constant) and P_e the mean
probability that the router gives it, the term is E · Σ_e f_e · P_e: 1 when factors are used alike, more when few are
preferred (Switch Transformers, Fedus et al. 2022, equation 4). A layer's term is the mean over its two pools; the loss
gains `balance_loss_weight` times the mean over the layers.

Summing the terms of the layers would be all, were it not for gradient checkpointing: a term that a checkpointed block
computes is either without a graph (reentrant) or keeps alive what checkpointing wants to free. So the terms travel as

- values: each layer notes its term, and the model's forward post-hook adds their mean to `output.loss`;
- gradients: each layer ties its term to its core, an identity whose backward pass gives the term its own gradient,
  d(what is minimised) / d(term). All of that but the scale is known in the forward pass; the scale is what arrives at
  `output.loss` in the backward pass, which always comes before any layer. It is noted there, so division by
  accumulation steps, a loss scaler, or a factor of the user's own count for the term as they do for the loss.

Backpropagating something else than `output.loss` leaves the terms out, as it should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MixLoraError


def load_balance(score: Tensor, index: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of one pool, a scalar. `score` [B, E], non-negative, `index` [B, r].

    P_e is of `score` divided by its row sums, so that p_B + p_AB of CFS is a probability too.
    """
    E = score.shape[-1]
    P = (score / score.sum(dim=-1, keepdim=True)).mean(dim=0)
    f = torch.zeros_like(P).scatter_add(0, index.flatten(), torch.ones_like(index.flatten(), dtype=P.dtype))
    return E * (f / index.numel() * P).sum()


class BalanceLoss:
    """The weighted terms of one forward pass of a model.

    Args:
        share: this batch's share of the loss, where the model divides by the tokens of several batches
            (`num_items_in_batch`); None where each batch's loss is a mean of its own.
    """

    def __init__(self, share: Tensor | None = None) -> None:
        self.share = share
        self.terms: list[Tensor] = []
        self.gradient: Tensor | None = None  # of each weighted term, known once the backward pass has begun

    def tie(self, core: Tensor, term: Tensor, note: bool) -> Tensor:
        """`core` unchanged, whose backward pass also starts that of the weighted `term` (a scalar).

        `note` tells a forward pass from a checkpoint's recomputation, whose term has been noted already.
        """
        if note:
            self.terms.append(term.detach())
        return _Tie.apply(core, term, self)

    def add_to(self, output: Any) -> Any:
        """The model's output with the mean of the noted terms in its loss.

        Raises:
            MixLoraError: the output holds no loss.
        """
        is_tuple = isinstance(output, tuple)
        loss = (output[0] if output else None) if is_tuple else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MixLoraError(
                "balance_loss_weight is added to the loss that the model returns, but this forward pass returned none; "
                "pass labels, or set balance_loss_weight=0"
            )
        loss = _Add.apply(loss, self)
        if is_tuple:
            return (loss, *output[1:])
        output.loss = loss
        return output


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, balance: BalanceLoss) -> Tensor:
        ctx.balance = balance
        mean = torch.stack([term.to(loss.device) for term in balance.terms]).mean()
        return loss + (mean if balance.share is None else mean * balance.share).to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        balance = ctx.balance
        balance.gradient = gradient.detach() / len(balance.terms)
        if balance.share is not None:
            balance.gradient = balance.gradient * balance.share
        return gradient, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Tensor, term: Tensor, balance: BalanceLoss) -> Tensor:
        ctx.balance, ctx.term_kind = balance, {"device": term.device, "dtype": term.dtype}
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_term = ctx.balance.gradient
        return gradient, None if of_term is None else of_term.to(**ctx.term_kind), None
