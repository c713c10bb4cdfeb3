"""Adds an update to what the base layer returns, in one operation and without another tensor of its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .companions import works_separately
from .mixture import promoted
from .recomputation import is_checkpointed_selectively


def added(result: Tensor, coefficients: Tensor, factors_B: Tensor, base_layer: nn.Module) -> Tensor:
    """result + (z C) B, in the dtype of `result`; `result` itself, changed, where nothing else can see that.

    Args:
        result: what `base_layer` has returned, [..., d_out].
        coefficients: z C, [B, S, E], with as many positions as `result`.
        factors_B: pool B, [E, d_out].
        base_layer: whose hooks may have kept what it returned.
    """
    device = result.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else promoted(coefficients.dtype, factors_B.dtype)
    if dtype != result.dtype or not _is_ours(result, base_layer):
        update = torch.matmul(coefficients, factors_B)
        if update.dtype != result.dtype:
            update = update.to(result.dtype)
        return result + (update if update.shape == result.shape else update.view(result.shape))
    coefficients, factors_B = coefficients.to(dtype), factors_B.to(dtype)
    return (
        _Add.apply(result, coefficients, factors_B)
        if torch.is_grad_enabled()
        else _add(result, coefficients, factors_B)
    )


def _add(result: Tensor, coefficients: Tensor, factors_B: Tensor) -> Tensor:
    result.view(-1, result.shape[-1]).addmm_(coefficients.reshape(-1, len(factors_B)), factors_B)
    return result


def _is_ours(result: Tensor, base_layer: nn.Module) -> bool:
    """Whether nobody else holds what the base layer has made, and autograd lets it be changed."""
    return not (
        torch.compiler.is_compiling()
        or works_separately()
        or torch._C._are_functorch_transforms_active()
        or type(result) is not Tensor
        or result._is_view()
        or not result.is_contiguous()
        or (result.is_leaf and result.requires_grad)
        or base_layer._forward_hooks
        or "forward" in base_layer.__dict__  # of a program that may keep what it returns
        or is_checkpointed_selectively()
    )


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
