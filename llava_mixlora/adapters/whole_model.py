"""A folder with an adapter in it, told apart from one with a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..errors import MixLoraError


def loading_whole_models(from_pretrained: Any) -> classmethod:
    """`from_pretrained` of a LLaVA that names an adapter for what it is, where transformers misses a model's weights.

    LLaVA puts a `config.json` beside its adapters, by which newer transformers takes them for whole models.
    """

    def load(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return from_pretrained.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            folder = str(pretrained_model_name_or_path)
            if not (Path(folder) / CONFIG_NAME).is_file():
                raise
            raise MixLoraError(
                f"{folder} holds an adapter, not a whole model; load it with "
                f"peft.AutoPeftModelForCausalLM.from_pretrained({folder!r}), or with tokenizer, vision tower and image "
                f"processor by llava.model.builder.load_pretrained_model({folder!r}, None, 'llava-lora')"
            ) from error

    return classmethod(load)
