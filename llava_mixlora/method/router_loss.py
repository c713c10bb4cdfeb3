"""The optional terms that train the routers (`balance_loss_weight`, `task_loss_weight`), and how they join the loss.

Balance: for one pool of one layer, with f_e the share of the batch's choices that fell on factor e (a constant) and P_e
the mean probability that the router gives it, the term is E · Σ_e f_e · P_e: 1 when factors are used alike, more when
few are preferred (Switch Transformers, Fedus et al. 2022, equation 4). Tasks: `task_subsets` has the term. A layer's
term is [`weighted_term`]; the loss gains the mean over the layers.

Summing the terms of the layers would be all, were it not for gradient checkpointing: a term that a checkpointed block
computes is either without a graph (reentrant) or keeps alive what checkpointing wants to free. So the terms travel as

- values: each layer notes its term, and the model's forward post-hook adds their mean to `output.loss`;
- gradients: each layer ties its term to its z C, an identity whose backward pass gives the term its own gradient,
  d(what is minimised) / d(term). All of that but the scale is known in the forward pass; the scale is what arrives at
  `output.loss` in the backward pass, which always comes before any layer. It is noted there, so division by
  accumulation steps, a loss scaler, or a factor of the user's own count for the term as they do for the loss. A
  compiled graph returns its terms instead, and gets their gradients from the loss, as it does for anything else.

A trainer may compute the loss itself, from what the model returns. TRL's SFTTrainer does so from the log-probabilities
of the answers' tokens: their gradient, the same for each, tells the scale of the loss. Otherwise, and where something
else is backpropagated than `output.loss`, the terms are left out, which is told.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import MixLoraError
from .layer_settings import LayerSettings
from .mixture import Route
from .task_subsets import task_loss


def load_balance(score: Tensor, index: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of one pool, [...], a number for each layer where layers are in front.

    `score` [..., B, E], non-negative; `index` [..., B, r]. P_e is of `score` divided by its row sums, so that
    p_B + p_AB of CFS is a probability too.
    """
    E = score.shape[-1]
    P = (score / score.sum(dim=-1, keepdim=True)).mean(dim=-2)
    chosen = index.flatten(-2)
    f = torch.zeros_like(P).scatter_add(-1, chosen, torch.ones_like(chosen, dtype=P.dtype))
    return E * (f / chosen.shape[-1] * P).sum(dim=-1)


def weighted_term(route: Route, settings: LayerSettings) -> Tensor | None:
    """A layer's term, the weighted sum of both, each the mean over its pools; None where both weights are zero.

    Of a route whose tensors have dimensions in front, such as layers, a term for each.
    """
    if settings.balance_loss_weight == 0 and settings.task_loss_weight == 0:
        return None
    pools = [(route.score_A, route.index_A), (route.score_B, route.index_B)]
    pools = pools[:1] if settings.pairing == "same" else pools
    terms = []
    if settings.balance_loss_weight != 0:
        terms += [settings.balance_loss_weight * load_balance(score, index) for score, index in pools]
    if settings.task_loss_weight != 0:
        terms += [settings.task_loss_weight * task_loss(score, index) for score, index in pools]
    return sum(terms) / len(pools)


class RouterLoss:
    """The weighted terms of one forward pass of a model.

    Args:
        share: this batch's share of the loss, where the model divides by the tokens of several batches
            (`num_items_in_batch`); None where each batch's loss is a mean of its own.
    """

    def __init__(self, share: Tensor | None = None) -> None:
        self.share = share
        self.terms: list[Tensor] = []
        self.gradient: Tensor | None = None  # of each weighted term, known once the backward pass has begun

    def tie(self, coefficients: Tensor, term: Tensor, note: bool) -> Tensor:
        """`coefficients` (z C) unchanged, whose backward pass also starts that of the weighted `term` (a scalar).

        `note` tells a forward pass from a checkpoint's recomputation, whose term has been noted already.
        """
        if torch.compiler.is_compiling():
            # What a graph keeps for its backward pass is the compiler's choice; nothing in it could be told a scale.
            self.terms.append(term)
            return coefficients
        if note:
            self.terms.append(term.detach())
        return _Tie.apply(coefficients, term, self)

    def gradients(self, ctx: Any) -> list[Tensor | None]:
        """Of the terms, the last inputs of the Function of `ctx`; None for what was tied instead."""
        needs = ctx.needs_input_grad[-len(self.terms) :]
        return [self.gradient.to(term.device, term.dtype) if need else None for term, need in zip(self.terms, needs)]

    def add_to(self, output: Any) -> Any:
        """The model's output with the mean of the noted terms in its loss.

        Raises:
            MixLoraError: the output holds no loss.
        """
        if isinstance(getattr(output, "log_probs", None), Tensor):
            output.log_probs = _Listen.apply(output.log_probs, output, self, *self.terms)
            return output
        is_tuple = isinstance(output, tuple)
        loss = (output[0] if output else None) if is_tuple else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MixLoraError(
                "balance_loss_weight and task_loss_weight join the loss that the model returns, but this forward pass "
                "returned none; pass labels, or set balance_loss_weight=0 and task_loss_weight=0"
            )
        loss = _Add.apply(loss, self, *self.terms)
        if is_tuple:
            return (loss, *output[1:])
        output.loss = loss
        return output


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, router_loss: RouterLoss, *terms: Tensor) -> Tensor:
        ctx.router_loss = router_loss
        mean = torch.stack([term.to(loss.device) for term in terms]).mean()
        return loss + (mean if router_loss.share is None else mean * router_loss.share).to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        router_loss = ctx.router_loss
        router_loss.gradient = gradient.detach() / len(router_loss.terms)
        if router_loss.share is not None:
            router_loss.gradient = router_loss.gradient * router_loss.share
        return gradient, None, *router_loss.gradients(ctx)


class _Listen(torch.autograd.Function):
    """Learns the scale of a loss that a trainer of TRL sums up from `log_probs` [B, S - 1] of the answers' tokens."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, output: Any, router_loss: RouterLoss, *terms: Tensor) -> Tensor:
        ctx.router_loss, ctx.counted = router_loss, output.label_mask
        # What SFTTrainer asks for, and no trainer of preferences or rewards does.
        ctx.is_sft = output.is_top1 is not None and getattr(output, "mean_logits", None) is None
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_tokens = gradient[ctx.counted]
        alike = ctx.is_sft and torch.allclose(of_tokens, of_tokens[:1], rtol=1e-3, atol=0) and (of_tokens <= 0).all()
        if not alike:
            raise MixLoraError(
                "balance_loss_weight and task_loss_weight cannot be added to a loss that the trainer computes itself, "
                "unless that is the mean negative log-likelihood (TRL's SFTTrainer with loss_type='nll'); set both to 0"
            )
        ctx.router_loss.gradient = -of_tokens.sum() / len(ctx.router_loss.terms)
        return gradient, None, None, *ctx.router_loss.gradients(ctx)


@functools.cache
def _tell_left_out() -> None:
    warnings.warn(
        "balance_loss_weight and task_loss_weight have no effect on a backward pass that does not begin at the loss "
        "which the model returns: the trainer computes its own; set both to 0, or train on output.loss",
        stacklevel=2,
    )


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, term: Tensor, router_loss: RouterLoss) -> Tensor:
        ctx.router_loss, ctx.term_kind = router_loss, {"device": term.device, "dtype": term.dtype}
        return coefficients.view_as(coefficients)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_term = ctx.router_loss.gradient
        if of_term is None:
            _tell_left_out()
        return gradient, None if of_term is None else of_term.to(**ctx.term_kind), None
