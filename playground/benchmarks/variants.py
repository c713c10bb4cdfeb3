"""What a benchmark compares: MixLoRA beside PEFT's LoRA, the frozen model, and the update as it is defined."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from llava_mixlora import MixLoraConfig
from llava_mixlora.method.model import LLAMA_LINEAR_LAYERS

POOLS = ((16, 4), (64, 8))  # E, r
FROZEN, REFERENCE, MATERIALISED = "frozen base", "LoRA r=E", "materialised"
DEFAULT = "MixLoRA"
"""The form that `MixLoraConfig()` has, whose routers see words: it needs a model that has them."""
TWO_ROUTERS = {"pairing": "rank", "router_scope": "prompt", "router_input": "hidden"}
MIXLORA = {
    DEFAULT: {},
    "MixLoRA same": {"pairing": "same", "router_scope": "instruction", "router_input": "hidden", "routing": "ifs"},
    "MixLoRA ifs": {**TWO_ROUTERS, "routing": "ifs"},
    "MixLoRA ifs_cfs": {**TWO_ROUTERS, "routing": "ifs_cfs"},
}


def measured(names: Iterable[str], cases: Iterable[Container[str]]) -> list[str]:
    """Those of the variants that a case has: stored figures may be older than a variant."""
    cases = list(cases)
    return [name for name in names if any(name in case for case in cases)]


def adapters(E: int, r: int) -> dict[str, Any]:
    """By name: the PEFT configuration of each variant, None for the frozen base."""
    common = {"target_modules": LLAMA_LINEAR_LAYERS, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    return {
        FROZEN: None,
        "LoRA r": LoraConfig(r=r, **common),
        REFERENCE: LoraConfig(r=E, **common),
        **{name: MixLoraConfig(r=r, num_factors=E, **form, **common) for name, form in MIXLORA.items()},
    }


class MaterialisedUpdate(nn.Module):
    """The same update by its definition: ΔW [B, d_out, d_in] is built for every instance, then applied.

    Routes are drawn once for `instances`: only the update is compared.
    """

    def __init__(self, base_layer: nn.Linear, num_factors: int, r: int, instances: int) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, 32 / r
        device = base_layer.weight.device
        drawn = torch.randn(num_factors, base_layer.in_features, device=device)
        self.A = nn.Parameter(drawn / base_layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(num_factors, base_layer.out_features, device=device))
        self.routes = torch.rand(2, instances, num_factors, device=device).topk(r).indices

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus x ΔWᵀ; x [B, S, d_in]."""
        chosen_A, chosen_B = self.A[self.routes[0]], self.B[self.routes[1]]  # [B, r, d_in], [B, r, d_out]
        delta = self.scaling * torch.bmm(chosen_B.transpose(1, 2), chosen_A)
        return self.base_layer(x) + torch.bmm(x, delta.transpose(1, 2))
