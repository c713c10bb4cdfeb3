"""Adds an update to what the base layer returns, in one operation and without another tensor of its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from .companions import works_separately
from .recomputation import is_checkpointed_selectively


def added(result: Tensor, coefficients: Tensor, factors_B: Tensor, base_layer: nn.Module) -> Tensor:
    """result + (z C) B, in the dtype of `result`; `result` itself, changed, where nothing else can see that.

    Args:
        result: what `base_layer` has returned, [..., d_out].
        coefficients: z C, [B, S, E], with as many positions as `result`.
        factors_B: pool B, [E, d_out].
        base_layer: whose hooks may have kept what it returned.
    """
    dtype, device = result.dtype, result.device.type
    if torch.is_autocast_enabled(device):
        fits = torch.get_autocast_dtype(device) == dtype
    else:
        fits = coefficients.dtype == dtype == factors_B.dtype
    if not fits or not _is_ours(result, base_layer):
        update = torch.matmul(coefficients, factors_B)
        if update.dtype != dtype:
            update = update.to(dtype)
        return result + (update if update.shape == result.shape else update.view(result.shape))
    # Asking costs less than a cast that does nothing.
    coefficients = coefficients if coefficients.dtype == dtype else coefficients.to(dtype)
    factors_B = factors_B if factors_B.dtype == dtype else factors_B.to(dtype)
    add = _Add.apply if torch.is_grad_enabled() else _add
    return add(result, coefficients, factors_B)


def _is_ours(result: Tensor, base_layer: nn.Module) -> bool:
    """Whether nobody else holds what the base layer has made, and autograd lets it be changed."""
    return not (
        torch.compiler.is_compiling()
        or type(result) is not Tensor
        or result._is_view()
        or base_layer._forward_hooks
        or module._global_forward_hooks
        or base_layer._modules  # which may have hooks of their own
        or "forward" in base_layer.__dict__  # of a program that may keep what it returns
        or not result.is_contiguous()
        or (torch.is_grad_enabled() and ((result.requires_grad and result.is_leaf) or is_checkpointed_selectively()))
        or torch._C._are_functorch_transforms_active()
        or works_separately()
    )


def _add(result: Tensor, coefficients: Tensor, factors_B: Tensor) -> Tensor:
    E, d_out = factors_B.shape
    result.view(-1, d_out).addmm_(coefficients.reshape(-1, E), factors_B)
    return result


class _Add(torch.autograd.Function):
    """result += coefficients @ factors_B, over rows; autograd's own in-place product of a view copies its gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, coefficients: Tensor, factors_B: Tensor) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(coefficients, factors_B)
        return _add(result, coefficients, factors_B)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        coefficients, factors_B = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_coefficients = of_B = None
        if ctx.needs_input_grad[1]:
            of_coefficients = (rows @ factors_B.t()).view(coefficients.shape)
        if ctx.needs_input_grad[2]:
            of_B = coefficients.reshape(-1, len(factors_B)).t() @ rows
        return gradient, of_coefficients, of_B
