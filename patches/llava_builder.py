"""`llava.model.builder`: adapters that stay adapters (a plain LoRA with `keep_adapter`), models that answer batches.

And models that load where flash attention is asked for and cannot be had.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llava_mixlora.adapters.adapter_folder import (
    base_model_of,
    check_adapter,
    is_mixlora_adapter,
    read_non_lora_trainables,
)
from llava_mixlora.attention import FLASH, available_attention
from llava_mixlora.errors import MixLoraError

from ..adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL
from .patch import ANY_KEYWORD, FAULT, METHOD, Patch

Loaded = tuple[Any, Any, Any, int]  # tokenizer, model, image processor, context length


def _load_mixlora(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(
        model_path: str, model_base: str | None, model_name: str, *args: Any, keep_adapter: bool = False, **kwargs: Any
    ) -> Loaded:
        if not is_mixlora_adapter(model_path) and not keep_adapter:
            return original(model_path, model_base, model_name, *args, **kwargs)
        base = base_model_of(model_path, model_base)
        check_adapter(model_path)
        trained_beside = read_non_lora_trainables(model_path)
        config = _llava_config(model_path)
        # Upstream loads the base as a complete LLaVA, with the configuration that training wrote (a bare Vicuna does
        # not know of a vision tower); then come the projector and the adapter. Its own LoRA branch would merge.
        name = "llava-mistral" if config.model_type == "llava_mistral" else "llava"  # chooses the class
        loaded = original(base, None, name, *args, **{**kwargs, "config": config})
        tokenizer, model, image_processor, context_length = loaded
        model.load_state_dict(trained_beside, strict=False)
        return tokenizer, _with_adapter(model, model_path), image_processor, context_length

    return load_pretrained_model


def _llava_config(model_path: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    if config.model_type.endswith("mpt"):
        raise MixLoraError(
            f"{model_path}: its config.json says model_type={config.model_type!r}, and MPT is not supported; expected "
            "an adapter of a Llama (llava_llama) or Mistral (llava_mistral)"
        )
    return config


def _with_adapter(model: Any, model_path: str) -> Any:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(model_path)
    if not is_mixlora_adapter(model_path) and not isinstance(config.target_modules, str):
        # In upstream's LoRA runs the tower is loaded after the adapter. PEFT 0.13 knows no exclude_modules.
        config.target_modules = rf"(?!{NOT_THE_LANGUAGE_MODEL}).*\.({'|'.join(sorted(config.target_modules))})"
    return PeftModel.from_pretrained(model, model_path, config=config).eval()


def _pad_on_the_left(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        loaded = original(*args, **kwargs)
        loaded[1].config.tokenizer_padding_side = "left"  # where LLaVA pads a batch after it has put the images in
        return loaded

    return load_pretrained_model


def _flash_attention_where_it_runs(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments["kwargs"]
        asked = FLASH if given.arguments.get("use_flash_attn") else options.get("attn_implementation")
        if asked is not None:
            given.arguments["use_flash_attn"] = False
            options["attn_implementation"] = available_attention(asked, given.arguments["device"])
        return original(*given.args, **given.kwargs)

    return load_pretrained_model


PATCHES = (
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=METHOD,
        why="upstream merges every adapter into its base, and asks for the base even where the adapter names it",
        replace=_load_mixlora,
        parameters=("model_path", "model_base", "model_name", ANY_KEYWORD),
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="a loaded model keeps the padding side of its training, the right, and in a batch (as lmms-eval asks) "
        "generate() then goes on from the padding of shorter prompts (haotian-liu/LLaVA#754)",
        replace=_pad_on_the_left,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="use_flash_attn, which model_worker has a flag for, fails where flash-attn is not installed or sees no GPU",
        replace=_flash_attention_where_it_runs,
    ),
)
