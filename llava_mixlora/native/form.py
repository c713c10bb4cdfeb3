"""The configuration of a LLaVA as transformers' class has it, and what of upstream's that class cannot be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..adapters.config_file import config_of
from ..adapters.llava_config import OF_TRANSFORMERS
from ..adapters.plain_lora import LORA
from ..adapters.reading import Adapter
from ..errors import MixLoraError

LANGUAGE_MODELS = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""Upstream's model types, and transformers' for the language model in each."""
TWO_LAYERS, ONE_LAYER = "mlp2x_gelu", "linear"
FEATURES = {"patch": "default", "cls_patch": "full"}
"""Which features of the tower are taken: upstream's word and transformers'."""
OF_POOLS = re.compile(r"\.(mixlora|lora)_")
BY_TOKEN = re.compile(r"\.(lm_head|embed_tokens)\.")
MODEL, CLASS = "llava", "LlavaForConditionalGeneration"


def check_can_be_native(config: Mapping[str, Any], place: str | Path) -> None:
    """Refuse a LLaVA that transformers' class computes otherwise. `config`: what its `config.json` says.

    Raises:
        MixLoraError: names the field, and what is possible.
    """

    def refuse(field: str, expected: str) -> None:
        raise MixLoraError(
            f"{place}: {field}={repr(config.get(field))[:100]}, of which transformers' {CLASS} knows nothing; expected "
            f"{expected}"
        )

    if config.get("model_type") == MODEL:
        raise MixLoraError(
            f"{place} is transformers' own LLaVA already; expected one of upstream's, or an adapter of it"
        )
    if config.get("model_type") not in LANGUAGE_MODELS:
        refuse("model_type", "a LLaVA of upstream's: " + ", ".join(LANGUAGE_MODELS))
    if not config.get("mm_vision_tower"):
        refuse("mm_vision_tower", "a LLaVA with a vision tower")
    if config.get("mm_projector_type", ONE_LAYER) not in (TWO_LAYERS, ONE_LAYER):
        refuse("mm_projector_type", f"{TWO_LAYERS} or {ONE_LAYER}")
    if config.get("mm_vision_select_feature", "patch") not in FEATURES:
        refuse("mm_vision_select_feature", " or ".join(FEATURES))
    layer = config.get("mm_vision_select_layer", -2)
    if type(layer) is not int or layer == 0:  # transformers 5 takes 0 for none
        refuse("mm_vision_select_layer", "a whole number other than 0, such as -2")
    if config.get("s2"):
        refuse("s2", "false: one scale of each image")
    if "anyres" in str(config.get("image_aspect_ratio")):
        refuse("image_aspect_ratio", "pad or square: an image cut into tiles is LLaVA-NeXT's")


def check_can_be_renamed(adapter: Adapter) -> None:
    """Refuse an adapter of which more would have to change than names.

    Raises:
        MixLoraError: it is neither MIXLORA nor a plain LoRA, adapts embeddings or head, or holds tensors of the tower.
    """
    if not adapter.is_mixlora and adapter.config.peft_type != LORA:
        raise MixLoraError(
            f"{adapter.folder} is an adapter of the type {getattr(adapter.config.peft_type, 'value', None)}; expected "
            "MIXLORA or LORA"
        )
    by_token = next((name for name in adapter.forms if BY_TOKEN.search(name) and OF_POOLS.search(name)), None)
    if by_token is not None:
        raise MixLoraError(
            f"{adapter.folder} adapts embeddings or head (it holds {by_token}), which have further rows in "
            "transformers' LLaVA; train again without them in target_modules, or with them in modules_to_save"
        )
    of_tower = next((name for name in adapter.forms if ".vision_tower." in name and not OF_POOLS.search(name)), None)
    if of_tower is not None:
        raise MixLoraError(
            f"{adapter.folder} holds {of_tower}, of the vision tower, which upstream's LLaVA loads apart from "
            "adapters; train again with bias='none' and no part of the tower in modules_to_save"
        )


def native_config(
    config: Mapping[str, Any], vision: CLIPVisionConfig, rows: int, image_token: int, dtype: torch.dtype
) -> Any:
    """transformers' `LlavaConfig` of upstream's LLaVA.

    Args:
        config: what the `config.json` of upstream's says, checked by [`check_can_be_native`].
        vision: of the vision tower.
        rows: of the token embeddings.
        image_token: id of what stands for an image's features in a sequence.
        dtype: of the weights.
    """
    of_text = _of_text(config)
    native = LlavaConfig(
        vision_config=vision,
        text_config={**of_text, "vocab_size": rows},
        image_token_index=image_token,
        image_seq_length=image_features(vision, config),
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=FEATURES[config.get("mm_vision_select_feature", "patch")],
        # One layer is two, of which the second passes on what the first gives.
        projector_hidden_act="gelu" if config.get("mm_projector_type") == TWO_LAYERS else "linear",
        tie_word_embeddings=bool(of_text.get("tie_word_embeddings")),
    )
    native.architectures = [CLASS]
    native.dtype = dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(native, name, config.get(name))
    return native


def vision_config(tower: str) -> CLIPVisionConfig:
    """That of a vision tower, a folder or a hub name.

    Raises:
        MixLoraError: it has no `config.json`, or is no CLIP.
    """
    found = config_of(tower)
    if found is None:
        raise MixLoraError(f"vision tower {tower}: it has no config.json; pass its place as --vision-tower")
    found = found.get("vision_config", found)  # of a CLIP with its text model, as OpenAI's are stored
    if found.get("model_type") != "clip_vision_model":
        raise MixLoraError(
            f"vision tower {tower}: model_type={repr(found.get('model_type'))[:100]}; expected a CLIP, as upstream's "
            "LLaVA has"
        )
    return CLIPVisionConfig.from_dict({name: value for name, value in found.items() if not name.startswith("_")})


def image_features(vision: CLIPVisionConfig, config: Mapping[str, Any]) -> int:
    """How many features of an image upstream's LLaVA takes from a tower, each in a place of the sequence."""
    whole = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    return (vision.image_size // vision.patch_size) ** 2 + whole


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model alone."""
    kind = LANGUAGE_MODELS[config["model_type"]]
    known = set(CONFIG_MAPPING[kind]().to_dict()) | OF_TRANSFORMERS
    without = {"architectures", "transformers_version", "dtype", "torch_dtype", "model_type"}
    return {"model_type": kind, **{name: config[name] for name in config if name in known - without}}
