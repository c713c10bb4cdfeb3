"""Which layers of a language model an adapter has tensors for, and how wide they are, by their `config.json` files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..method.stored_tensors import Widths

LIKE_LLAMA = ("llama", "mistral", "qwen2", "llava_llama", "llava_mistral", "llava_qwen")
"""Model types whose decoder layers have the names and widths of [`decoder_layers`]."""
IN_DECODER = re.compile(r"model\.layers\.\d+\..+")


def decoder_layers(config: Mapping[str, Any]) -> dict[str, Widths] | None:
    """The linear layers of a decoder by name, from its model's `config.json`; None of models not known here."""
    hidden, inner, heads, number = (
        config.get(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    )
    if config.get("model_type") not in LIKE_LLAMA or not all(
        type(each) is int for each in (hidden, inner, heads, number)
    ):
        return None
    of_head = config.get("head_dim") or hidden // heads
    queries, keys = heads * of_head, (config.get("num_key_value_heads") or heads) * of_head
    widths = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{layer}.{name}": Widths(*both, None) for layer in range(number) for name, both in widths.items()
    }


def targeted(config: Any, layers: Mapping[str, Widths]) -> dict[str, Widths] | None:
    """Those of the layers that a configuration adapts, by PEFT's rules; None where it leaves that to PEFT."""
    targets, excluded = config.target_modules, getattr(config, "exclude_modules", None)
    if not targets or targets == "all-linear":
        return None
    indices = config.layers_to_transform
    indices = [indices] if isinstance(indices, int) else indices

    def is_targeted(name: str) -> bool:
        if excluded and _is_named(name, excluded):
            return False
        return _is_named(name, targets) and (not indices or int(name.split(".")[2]) in indices)

    return {name: widths for name, widths in layers.items() if is_targeted(name)}


def _is_named(layer: str, names: Any) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)
