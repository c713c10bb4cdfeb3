"""A LLaVA model ready to be asked: an adapter on its base, or a plain checkpoint, through upstream's own loader."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from ..adapters.adapter_folder import is_adapter
from ..adapters.its_llava import use_its_llava
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.model_places import adapter_of, base_model_of
from ..errors import MixLoraError
from ..import_failures import told_in_one_line
from ..inputs import check_model_path
from ..llava_package import part, used

Loaded = tuple[Any, Any, Any]
"""Tokenizer, model and image processor."""


def load_for_inference(
    model_path: str | Path,
    model_base: str | Path | None = None,
    bits: int = 16,
    keep_adapter: bool = False,
    choices: ModelChoices = AS_NAMED,
) -> Loaded:
    """Load a MixLoRA adapter, an adapter of LLaVA's LoRA runs, or a whole LLaVA; in evaluation mode.

    On a GPU (under a launcher the one of its `LOCAL_RANK`) in float16; without one in float32, or in bfloat16 where
    that would take more than half of the memory.

    Args:
        model_path: folder of the adapter or of the model, or a hub name.
        model_base: the adapter's base; by default the one that it names. A whole model has none.
        bits: 16, or 8 or 4 to quantize the language model.
        keep_adapter: keep an adapter of LLaVA's LoRA runs beside its base, where upstream merges it.
        choices: what the user says of its parts.

    Raises:
        MixLoraError: there is no such folder, an adapter's base is missing or another one, its files are damaged, or
            the LLaVA's own loader fails.
    """
    check_model_path("--model-path", str(model_path))
    from .. import patches

    use_its_llava(adapter_of(str(model_path)))
    patches.apply()
    load_pretrained_model = part("llava.model.builder:load_pretrained_model")
    _check_asks_no_more(load_pretrained_model)
    model_path = adapter_of(str(model_path))
    has_adapter = is_adapter(model_path)
    base = base_model_of(model_path, model_base and str(model_base)) if has_adapter else None
    # Upstream takes its branch by the name, and merges its own adapters.
    name = "llava-lora" if has_adapter else "llava-mistral" if _is_mistral(model_path) else "llava"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with told_in_one_line():
        tokenizer, model, image_processor, _ = load_pretrained_model(
            str(model_path),
            base,
            name,
            load_8bit=bits == 8,
            load_4bit=bits == 4,
            **_places(load_pretrained_model, device),
            keep_adapter=keep_adapter,
            choices=choices,
        )
    if device == "cpu" and bits == 16:
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        model = model.float() if size < psutil.virtual_memory().total / 2 else model.bfloat16()
    if isinstance(image_processor, dict):  # in some forks there is one for each kind of input
        image_processor = image_processor.get("image")
    return tokenizer, model.eval(), image_processor


def _check_asks_no_more(loader: Callable[..., Any]) -> None:
    given = ("model_path", "model_base", "model_name", "load_8bit", "load_4bit", "device_map", "device")
    for name, parameter in inspect.signature(loader).parameters.items():
        is_asked = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_asked and name not in given:
            raise MixLoraError(
                f"load_pretrained_model of {used().name} asks for {name!r}, which no file of a model tells; load it in "
                "a script of yours that says it, under llava-mixlora run SCRIPT.py"
            )


def _places(loader: Callable[..., Any], device: str) -> dict[str, Any]:
    """How a loader is told where the model goes, the vision tower with it."""
    if "device" in inspect.signature(loader).parameters:
        return {"device_map": device, "device": device}
    # Forks without it leave the tower where an "auto" puts it, and else move it to a GPU.
    return {"device_map": "auto" if device == "cpu" else {"": device}}


def _is_mistral(model_path: str | Path) -> bool:
    return PretrainedConfig.get_config_dict(str(model_path))[0].get("model_type") == "llava_mistral"
