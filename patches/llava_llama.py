"""`llava.model.language_model.llava_llama`: loading a quantized LLaVA."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .patch import Patch

# The names as transformers 5 matches them: from the start of a module's full name, such as model.mm_projector.0
NEVER_QUANTIZED = [".*mm_projector", ".*vision_tower", ".*vision_resampler"]


def _one_quantization_setting(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config") is not None:
            kwargs.pop("load_in_4bit", None)
            kwargs.pop("load_in_8bit", None)
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _load_in_8bit_as_configuration(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        from transformers import BitsAndBytesConfig

        if kwargs.get("load_in_8bit") and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _quantize_the_language_model_only(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        from transformers import BitsAndBytesConfig

        if isinstance(kwargs.get("quantization_config"), BitsAndBytesConfig):
            quantization = kwargs["quantization_config"] = copy.copy(kwargs["quantization_config"])
            # Without names, transformers would leave out the output layer; with some, it leaves out those alone.
            named = quantization.llm_int8_skip_modules or ["lm_head"]
            quantization.llm_int8_skip_modules = [*named, *NEVER_QUANTIZED]
            if "torch_dtype" not in kwargs and "dtype" not in kwargs:
                kwargs["torch_dtype"] = torch.float16
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


PATCHES = (
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        why="LLaVA passes load_in_4bit beside a quantization_config that says the same, which transformers refuses",
        replace=_one_quantization_setting,
        requires={"transformers": ">=4.38"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        why="transformers 5 now quantizes the projector that train() excludes by another name, and that the builder "
        "fills with 16-bit weights, and no longer makes the rest of a quantized model float16, which the builder's "
        "images are",
        replace=_quantize_the_language_model_only,
        requires={"transformers": ">=5"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        why="the builder passes load_in_8bit, which transformers 5 only knows inside of a quantization_config",
        replace=_load_in_8bit_as_configuration,
        requires={"transformers": ">=5"},
    ),
)
