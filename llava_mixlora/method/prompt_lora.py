"""The plain LoRA that MixLoRA's update is for one prompt.

While routes are held, Δy = (α/r) Σ_j b_idx_B[j] (a_idx_A[j] · x) is a LoRA of rank r, A' = A[idx_A] and
B' = (α/r) B[idx_B]ᵀ, with all of the mixture in it: what serves LoRAs serves the prompt, and its answer, exactly.
"""

from __future__ import annotations

from torch import Tensor

from .layer import MixLoraLayer

PromptLora = dict[str, tuple[Tensor, Tensor]]
"""By layer name: A' [r, d_in] and B' [d_out, r] of the update x A'ᵀ B'ᵀ, whose scaling is 1."""


def lora_of_core(layer: MixLoraLayer, adapter: str, core: Tensor) -> tuple[Tensor, Tensor]:
    """A' and B' of one instance's core [E, E], or of its gates [E], in the dtype of the factors."""
    factors_A, factors_B = layer.mixlora_A[adapter].detach(), layer.mixlora_B[adapter].detach()
    if core.ndim == 1:
        (chosen,) = core.nonzero(as_tuple=True)
        index_A, index_B, weights = chosen, chosen, core[chosen]
    else:
        index_A, index_B = core.nonzero(as_tuple=True)
        weights = core[index_A, index_B]
    up = factors_B[index_B] * weights.to(factors_B.dtype).unsqueeze(1)
    return factors_A[index_A].contiguous(), up.T.contiguous()
