"""`llava.model.language_model`: loading a quantized LLaVA, whichever language model it has, and generating with it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from llava_mixlora.adapters.whole_model import loading_whole_models
from llava_mixlora.llava_package import used

from .patch import COMPATIBILITY, FAULT, Patch

NEVER_QUANTIZED = ["mm_projector", "vision_tower", "vision_resampler"]
# transformers 5 matches from the start of a module's full name, such as model.mm_projector.0; before, it looked inside.
FROM_THE_START = [f".*{name}" for name in NEVER_QUANTIZED]


def _one_quantization_setting(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config") is not None:
            kwargs.pop("load_in_4bit", None)
            kwargs.pop("load_in_8bit", None)
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _into_empty_weights(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") is not None and kwargs.get("low_cpu_mem_usage") is False:
            del kwargs["low_cpu_mem_usage"]
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _load_in_8bit_as_configuration(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        from transformers import BitsAndBytesConfig

        if kwargs.get("load_in_8bit") and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _quantize_the_language_model_only(names: list[str]) -> Callable[[Any], classmethod]:
    def replace(original: Any) -> classmethod:
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            from transformers import BitsAndBytesConfig

            if isinstance(kwargs.get("quantization_config"), BitsAndBytesConfig):
                quantization = kwargs["quantization_config"] = copy.copy(kwargs["quantization_config"])
                # Without names, transformers would leave out the output layer; with some, it leaves out those alone.
                named = quantization.llm_int8_skip_modules or ["lm_head"]
                quantization.llm_int8_skip_modules = [*named, *names]
                if "torch_dtype" not in kwargs and "dtype" not in kwargs:
                    kwargs["torch_dtype"] = torch.float16
            return original.__func__(cls, *args, **kwargs)

        return classmethod(from_pretrained)

    return replace


def _placed_with_little_memory(original: Any) -> classmethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") is not None and kwargs.get("low_cpu_mem_usage") is False:
            kwargs["low_cpu_mem_usage"] = True
        return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _drop_cache_position(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, cache_position: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)  # the decoder finds the position in the cache

    return forward


def _with_the_last_token_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_inputs_for_generation(
        self: Any, input_ids: torch.Tensor, past_key_values: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        # One with a generate() of its own hands over embeddings, and counts them.
        puts_images_in_each_time = not any("generate" in vars(cls) for cls in _classes_of_the_llava(self))
        inputs = original(self, input_ids, past_key_values, *args, **kwargs)
        if puts_images_in_each_time and past_key_values and inputs.get("images") is not None:
            inputs["input_ids"] = input_ids[:, -1:]
            if inputs.get("position_ids") is not None:
                inputs["position_ids"] = inputs["position_ids"][:, -1:]
        return inputs

    return prepare_inputs_for_generation


def _classes_of_the_llava(model: Any) -> list[type]:
    return [cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == used().name]


PATCHES = (
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.prepare_inputs_for_generation",
        kind=COMPATIBILITY,
        why="transformers counts the cache, image features in it, against a prompt without them, and gives some LLaVAs "
        "their prompt anew with every token",
        replace=_with_the_last_token_alone,
        parameters=("input_ids", "past_key_values"),
        requires={"transformers": ">=4.36,<5"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.forward",
        kind=COMPATIBILITY,
        why="generate() passes a cache_position, which LLaVA's forward() does not take (haotian-liu/LLaVA#1218)",
        replace=_drop_cache_position,
        requires={"transformers": ">=4.38,<5.4"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=COMPATIBILITY,
        why="LLaVA passes load_in_4bit beside a quantization_config that says the same, which transformers refuses",
        replace=_one_quantization_setting,
        requires={"transformers": ">=4.38"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=FAULT,
        why="LLaVA-NeXT asks for low_cpu_mem_usage=False with --bits 4 too, which transformers refuses beside the "
        "device_map that it gives then",
        replace=_into_empty_weights,
        requires={"transformers": "<5"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=COMPATIBILITY,
        why="transformers 5 now quantizes the projector that train() excludes by another name, and that the builder "
        "fills with 16-bit weights, and no longer makes the rest of a quantized model float16, which the builder's "
        "images are",
        replace=_quantize_the_language_model_only(FROM_THE_START),
        requires={"transformers": ">=5"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=FAULT,
        why="transformers quantizes the projector too, which the builder then fills with 16-bit weights",
        replace=_quantize_the_language_model_only(NEVER_QUANTIZED),
        requires={"transformers": "<5"},
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=FAULT,
        why="some builders name a device that is not 'cuda' together with low_cpu_mem_usage=False, which transformers "
        "refuses",
        replace=_placed_with_little_memory,
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=COMPATIBILITY,
        why="the builder passes load_in_8bit outside of a quantization_config, where transformers 5 does not know it, "
        "and where no one can leave the projector out",
        replace=_load_in_8bit_as_configuration,
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.from_pretrained",
        kind=FAULT,
        why="transformers, AutoModelForCausalLM too, takes an adapter for a whole model by the config.json that LLaVA "
        "puts beside it, and ends with weights that are missing",
        replace=loading_whole_models,
    ),
)
