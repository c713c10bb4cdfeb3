"""`transformers`, and TRL: names that they have taken away, and that some LLaVAs still import.

Each is put back only where the LLaVA that is used imports it, and where it is missing.
"""

from __future__ import annotations

import enum
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava_mixlora.errors import MixLoraError

from .patch import COMPATIBILITY, Patch


class ShardedDDPOption(str, enum.Enum):
    """Fairscale's ways of sharding, none of which transformers knows any more."""

    SIMPLE = "simple"
    ZERO_DP_2 = "zero_dp_2"
    ZERO_DP_3 = "zero_dp_3"
    OFFLOAD = "offload"
    AUTO_WRAP = "auto_wrap"


def blocked_padding(mask: Tensor, tgt_length: int) -> Tensor:
    """Where attention is blocked, bool [B, 1, tgt_length, S], by a mask [B, S] that is 0 at padding."""
    return (mask == 0)[:, None, None, :].expand(-1, 1, tgt_length, -1)


def blocked_future(
    input_ids_shape: Sequence[int], device: torch.device | str | None = None, past_key_values_length: int = 0
) -> Tensor:
    """Where attention is blocked, bool [B, 1, T, past + T], for what comes later than a token."""
    rows, tokens = input_ids_shape
    ahead = torch.ones(tokens, past_key_values_length + tokens, dtype=torch.bool, device=device)
    return ahead.triu(past_key_values_length + 1).expand(rows, 1, -1, -1)


def added_for_padding(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """What is added to attention scores, [B, 1, tgt_len, S], for a mask [B, S] that is 0 at padding."""
    return _added(blocked_padding(mask, tgt_len or mask.shape[1]), dtype)


def added_for_future(
    input_ids_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    past_key_values_length: int = 0,
) -> Tensor:
    """What is added to attention scores, [B, 1, T, past + T]."""
    return _added(blocked_future(input_ids_shape, device, past_key_values_length), dtype)


def contrastive_loss(similarity: Tensor) -> Tensor:
    """The mean cross entropy of texts' own pictures and of pictures' own texts, for similarities [B, B]."""
    own = torch.arange(len(similarity), device=similarity.device)
    return (functional.cross_entropy(similarity, own) + functional.cross_entropy(similarity.T, own)) / 2


def _added(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill(blocked, torch.finfo(dtype).min)


def _of_pytorch_utils(name: str) -> Callable[[None], Any]:
    def replace(_: None) -> Any:
        from transformers import pytorch_utils

        # What transformers 5 has dropped altogether is of pruning heads, which no LLaVA does.
        return getattr(pytorch_utils, name, functools.partial(_refuse, name))

    return replace


def _gradient_accumulation_plugin(_: None) -> type:
    from accelerate.utils import GradientAccumulationPlugin

    return GradientAccumulationPlugin


def _of_deepspeed(_: None) -> ModuleType:
    return importlib.import_module("transformers.integrations.deepspeed")


def _unavailable(_: None) -> Callable[[], bool]:
    return lambda: False


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise MixLoraError(f"{name} is gone from the versions installed here; expected a run that does without it")


def _former(target: str, value: Any, imported: str | None = None) -> Patch:
    """A name put back as `value`, for LLaVAs that import it, or `imported`."""
    return Patch(
        target,
        kind=COMPATIBILITY,
        why="some LLaVAs import it, or what goes with it, from where it no longer is",
        replace=value if callable(value) and not isinstance(value, type) else lambda _: value,
        adds=True,
        imported=imported or target,
    )


BLOOM, OPT, CLIP = (f"transformers.models.{name}.modeling_{name}" for name in ("bloom", "opt", "clip"))
PATCHES = (
    _former("transformers.trainer:ShardedDDPOption", ShardedDDPOption),
    _former("transformers.trainer:Trainer.sharded_ddp", None, "transformers.trainer:ShardedDDPOption"),
    _former(f"{BLOOM}:_expand_mask", lambda _: blocked_padding),
    _former(f"{BLOOM}:_make_causal_mask", lambda _: blocked_future),
    _former(f"{OPT}:_expand_mask", lambda _: added_for_padding),
    _former(f"{OPT}:_make_causal_mask", lambda _: added_for_future),
    _former(f"{CLIP}:_expand_mask", lambda _: added_for_padding),
    _former(f"{CLIP}:clip_loss", lambda _: contrastive_loss),
    _former("transformers.deepspeed", _of_deepspeed, "transformers.deepspeed:is_deepspeed_zero3_enabled"),
    _former("transformers.utils:is_flax_available", _unavailable),
    _former("transformers.utils.import_utils:is_torch_fx_available", _unavailable),
    *(
        _former(f"transformers.modeling_utils:{name}", _of_pytorch_utils(name))
        for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
    ),
    _former(
        "transformers.trainer:GradientAccumulationPlugin",
        _gradient_accumulation_plugin,
    ),
    _former(
        "trl.trainer.utils:DPODataCollatorWithPadding",
        lambda _: functools.partial(_refuse, "DPODataCollatorWithPadding"),
    ),
)
