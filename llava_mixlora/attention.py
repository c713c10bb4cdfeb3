"""Flash attention where it can be used, PyTorch's own elsewhere."""

from __future__ import annotations

import os
from typing import Any

FLASH, INSTEAD = "flash_attention_2", "sdpa"


def available_attention(implementation: str | None, device: Any = "cuda") -> str | None:
    """What can be used for an `attn_implementation` of transformers: flash attention needs flash-attn and a GPU.

    Where SDPA takes its place, the first process of the run says so. SDPA has flash kernels of its own.
    """
    from transformers.utils import is_flash_attn_2_available

    if implementation != FLASH:
        return implementation
    if not str(device).startswith("cuda"):
        reason = f"flash-attn does not run on {device}"
    elif not is_flash_attn_2_available():
        reason = "flash-attn is not installed or sees no GPU"
    else:
        return FLASH
    if os.environ.get("RANK", "0") == "0":
        print(f"{reason}: using PyTorch's scaled dot product attention instead.", flush=True)
    return INSTEAD
