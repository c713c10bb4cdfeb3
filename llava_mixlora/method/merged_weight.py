"""A linear layer's weight with an update added to it, however the layer stores it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from ..errors import MixLoraError


def weight_of(base_layer: nn.Module) -> nn.Parameter:
    """The parameter that a merge replaces.

    Raises:
        MixLoraError: the layer has no weight that an update can be added to.
    """
    weight = getattr(base_layer, "weight", None)
    if isinstance(weight, Tensor) and (weight.is_floating_point() or _is_quantized(weight)):
        return weight
    raise MixLoraError(
        f"{type(base_layer).__name__} cannot take up an adapter: expected a weight of floats or of bitsandbytes; merge "
        "into the 16-bit base with `llava-mixlora merge` instead"
    )


def merged_weight(base_layer: nn.Module, delta: Tensor) -> nn.Parameter:
    """A new parameter that is the layer's weight plus `delta` [d_out, d_in]; the layer is left as it is.

    Floats are added in float32 at least. A weight of bitsandbytes is dequantized and quantized again, with a warning.
    """
    weight = weight_of(base_layer)
    if not _is_quantized(weight):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if type(base_layer).__name__ == "Conv1D":
            delta = delta.t()
        total = weight.detach().to(dtype) + delta.to(weight.device, dtype)
        return nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    bits = 4 if type(weight).__name__ == "Params4bit" else 8
    warnings.warn(
        f"merging into a {bits}-bit layer quantizes its weight again, which rounds the update; merging into the 16-bit "
        "base is closer to what was trained",
        stacklevel=2,
    )
    dense = _dequantized(base_layer)
    total = (dense.float() + delta.to(dense.device, torch.float32)).to(dense.dtype)
    return _quantized_like(weight, total)


def set_weight(base_layer: nn.Module, weight: nn.Parameter) -> None:
    """Make `weight` the layer's. The one before can be set again: what an 8-bit layer took out of it goes back."""
    before, state = base_layer.weight, getattr(base_layer, "state", None)
    if type(before).__name__ == "Int8Params" and state is not None:
        if before.CB is None:
            before.CB, before.SCB = state.CB, state.SCB
        state.reset_grads()
    base_layer.weight = weight
    if type(weight).__name__ == "Params4bit":
        base_layer.quant_state = weight.quant_state


def _is_quantized(weight: Tensor) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _dequantized(base_layer: nn.Module) -> Tensor:
    if getattr(getattr(base_layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        # On CPUs with AVX512-BF16 a 4-bit layer lays its weight out anew when it is first called in eval mode. The
        # functions that dequantize do not know that layout; a layer takes it back when it is saved.
        base_layer = copy.deepcopy(base_layer)
        base_layer.state_dict()
    return dequantize_bnb_weight(base_layer.weight, state=getattr(base_layer, "state", None))


def _quantized_like(weight: Any, dense: Tensor) -> nn.Parameter:
    import bitsandbytes

    dense = dense.to("cpu")
    if type(weight).__name__ == "Int8Params":
        new = bitsandbytes.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
        return new.to(weight.device)
    state = weight.quant_state
    new = bitsandbytes.nn.Params4bit(
        dense,
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=state.nested,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    return new.to(weight.device)
