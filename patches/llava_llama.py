"""`llava.model.language_model.llava_llama`: loading a quantized LLaVA."""

from __future__ import annotations

from typing import Any

from .patch import Patch


def _one_quantization_setting(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config") is not None:
            kwargs.pop("load_in_4bit", None)
            kwargs.pop("load_in_8bit", None)
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


PATCHES = (
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        why="LLaVA passes load_in_4bit beside a quantization_config that says the same, which transformers refuses",
        replace=_one_quantization_setting,
        requires={"transformers": ">=4.38"},
    ),
)
