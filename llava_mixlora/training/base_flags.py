"""The flags of a run that its base decides: filled in where they are not given, refused where they contradict it.

A LLaVA was trained with one projector, on one layer of one vision tower, with or without its own tokens around images;
upstream takes the flags' words, or its defaults, for that, writes them to `config.json`, and loads the result as they
say. A bare language model decides nothing; there the pretrained projector does, by its tensors and by the `config.json`
beside it, and what neither tells is as in LLaVA 1.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.config_file import absolute, config_of
from ..adapters.pickles import read_state_dict
from ..adapters.tower_config import Tower, tower_config
from ..errors import MixLoraError
from .preflight import zero_stage

UNLESS_TOLD = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat"}
"""What upstream takes for a LLaVA whose `config.json` does not say."""
OF_FEATURES = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type")
"""Flags that say what a projector is and what it is given."""
OF_TOKENS = ("mm_use_im_start_end", "mm_use_im_patch_token")
LLAVA_15 = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "model_max_length": 2048,
}
SQUARES = ("square", "pad")
"""The ways to make an image square (`--image_aspect_ratio`), all that upstream's training knows."""


@dataclass(frozen=True)
class Says:
    """What a file says of a flag, and who was trained so."""

    value: Any
    source: str


def flags_of_the_base(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are to be added to those of a run that trains an adapter, with their values.

    Args:
        given: the values of the flags that are given, by name.
        defaults: upstream's defaults of all flags that it has; those that it has not are not added.

    Raises:
        MixLoraError: a flag contradicts the base, or the result could not be used: the projector does not fit, or
            images fill all that `--model_max_length` leaves.
    """
    base = config_of(given.get("model_name_or_path"), given.get("cache_dir"))
    if base is None:  # upstream says why the model cannot be loaded
        return {}
    is_llava = base.get("mm_vision_tower") is not None
    says = _of_a_llava(base, given, defaults) if is_llava else _of_a_projector(given)
    _check_contradictions(given, says)
    filled = {flag: told.value for flag, told in says.items()}
    if not is_llava and _has_pictures(given):
        filled = {**LLAVA_15, "model_max_length": min(2048, base.get("max_position_embeddings", 2048)), **filled}
    added = {flag: value for flag, value in filled.items() if flag not in given and flag in defaults}
    tower = {**added, **given}.get("vision_tower")
    if tower and absolute(tower) != given.get("vision_tower"):
        added["vision_tower"] = absolute(tower)  # config.json keeps it, and is read in other working directories
    _check_result({**defaults, **given, **added}, base, is_llava)
    return added


def _of_a_llava(base: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Says]:
    model = given["model_name_or_path"]
    told = {flag: base.get(flag, UNLESS_TOLD.get(flag)) for flag in (*OF_FEATURES, *OF_TOKENS, "image_aspect_ratio")}
    if "image_grid_pinpoints" in defaults:  # a fork that cuts images into tiles itself, and says how by further flags
        del told["image_aspect_ratio"], told["mm_patch_merge_type"]
    elif told["image_aspect_ratio"] not in (None, *SQUARES):
        if given.get("image_aspect_ratio") not in SQUARES:
            raise MixLoraError(
                f"--image_aspect_ratio: {model} was trained with {told['image_aspect_ratio']!r}, which this LLaVA's "
                "training does not cut images by (it would take them square and fail when asked); give "
                "--image_aspect_ratio pad to train and ask it on whole padded images"
            )
        told |= {"image_aspect_ratio": None, "mm_patch_merge_type": "flat"}  # of one image there is nothing to merge
    told["vision_tower"] = base["mm_vision_tower"]
    told["model_max_length"] = base.get("tokenizer_model_max_length")
    return {flag: Says(value, model) for flag, value in told.items() if value is not None}


def _of_a_projector(given: Mapping[str, Any]) -> dict[str, Says]:
    file = given.get("pretrain_mm_mlp_adapter")
    if not file or not Path(file).is_file():
        return {}
    beside = Path(file).parent / "config.json"
    config = config_of(str(beside.parent)) or {}
    if "mm_vision_tower" not in config:  # of something else that lies there
        config = {}
    told = {flag: Says(config[flag], str(beside)) for flag in (*OF_FEATURES, *OF_TOKENS) if flag in config}
    if config:
        told["vision_tower"] = Says(config["mm_vision_tower"], str(beside))
    kind = _projector_type(_projector(file))
    return told if kind is None else {**told, "mm_projector_type": Says(kind, file)}


def _check_contradictions(given: Mapping[str, Any], says: Mapping[str, Says]) -> None:
    for flag, told in says.items():
        if flag not in given or given[flag] == told.value or flag == "model_max_length":
            continue
        if flag == "vision_tower":
            _check_same_tower(given, told)
        # Nobody chose square: train() writes it where the flag is left out.
        elif not (flag == "image_aspect_ratio" and told.value == "square"):
            raise MixLoraError(
                f"--{flag} {given[flag]}: {told.source} was trained with {told.value}, and its weights are only right "
                f"for that; leave the flag out, or give --{flag} {told.value}"
            )


def _check_same_tower(given: Mapping[str, Any], told: Says) -> None:
    """Let a tower have another name than the base has for it, such as that of a copy, but not another form."""
    flag, cache = given["vision_tower"], given.get("cache_dir")
    wanted, found = tower_config(told.value, cache), tower_config(flag, cache)
    if wanted is None or found is None or absolute(flag) == absolute(told.value):
        return
    for field in Tower._fields:
        if getattr(found, field) != getattr(wanted, field):
            raise MixLoraError(
                f"--vision_tower {flag}: {told.source} was trained with {told.value}, which is another tower "
                f"({field} {getattr(wanted, field)}, here {getattr(found, field)}); leave the flag out, or give "
                f"--vision_tower {told.value} or the folder of a copy of it"
            )


def _has_pictures(given: Mapping[str, Any]) -> bool:
    return any(given.get(flag) for flag in ("vision_tower", "pretrain_mm_mlp_adapter", "image_folder"))


def _check_result(flags: Mapping[str, Any], base: Mapping[str, Any], is_llava: bool) -> None:
    tower = flags.get("vision_tower")
    if not tower:
        return
    config = tower_config(tower, flags.get("cache_dir"))
    projector = flags.get("pretrain_mm_mlp_adapter")
    if projector and Path(projector).is_file():
        _check_projector(flags, base, is_llava, config)
    if config is None:
        return
    if is_llava and base.get("mm_hidden_size", config.hidden_size) != config.hidden_size:
        raise MixLoraError(
            f"--vision_tower {tower}: its features have {config.hidden_size} numbers, and the projector of "
            f"{flags['model_name_or_path']} takes {base['mm_hidden_size']}; give the tower that it was trained with "
            f"({base['mm_vision_tower']}), or a copy of it"
        )
    layer, layers = flags.get("mm_vision_select_layer", -2), config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise MixLoraError(
            f"--mm_vision_select_layer {layer}: {tower} has {layers} layers; expected {-layers - 1} to {layers} (LLaVA "
            "1.5: -2)"
        )
    taken = config.image_tokens(flags.get("mm_vision_select_feature", "patch"))
    if flags["model_max_length"] <= taken:
        raise MixLoraError(
            f"--model_max_length {flags['model_max_length']}: an image alone takes {taken} tokens with {tower}, so "
            "nothing would be left to learn from; give more, as LLaVA 1.5 does with --model_max_length 2048"
        )


def _check_projector(flags: Mapping[str, Any], base: Mapping[str, Any], is_llava: bool, tower: Tower | None) -> None:
    file = flags["pretrain_mm_mlp_adapter"]
    flag = f"--pretrain_mm_mlp_adapter {file}"
    if is_llava and flags.get("deepspeed") and zero_stage(flags["deepspeed"]) == 3:
        raise MixLoraError(
            f"{flag}: {flags['model_name_or_path']} has a projector of its own, which ZeRO-3 has spread over the "
            "processes when this one would be read; leave the flag out, or use ZeRO-2"
        )
    tensors = _projector(file)
    kind = _projector_type(tensors)
    if kind is not None and kind != flags["mm_projector_type"]:
        raise MixLoraError(
            f"{flag}: it is a projector of the type {kind}, and --mm_projector_type is {flags['mm_projector_type']}; "
            "give the projector that belongs to the base"
        )
    shape = _shape(tensors)
    wanted = base.get("hidden_size"), tower and tower.hidden_size
    for what, found, expected in zip(("a language model", "a vision tower"), shape or (), wanted):
        if expected is not None and found != expected:
            raise MixLoraError(
                f"{flag}: it was trained for {what} with hidden_size {found}, and here that has {expected}; give the "
                f"projector of {flags['model_name_or_path']} and {flags['vision_tower']}"
            )
    if flags.get("mm_use_im_start_end") and "model.embed_tokens.weight" not in _read_projector(file):
        raise MixLoraError(
            f"--mm_use_im_start_end True: {file} holds no embeddings of the tokens around images, which LLaVA would "
            "take from it; leave the flag out, or give a projector that was pretrained with it"
        )


def _projector(file: str) -> dict[str, Tensor]:
    """The projector's tensors by their names inside of it, as upstream reads them."""
    word = "mm_projector."
    return {name.split(word)[1]: tensor for name, tensor in _read_projector(file).items() if word in name}


def _read_projector(file: str) -> dict[str, Tensor]:
    try:
        return read_state_dict(Path(file))
    except MixLoraError as error:
        raise MixLoraError(
            f"--pretrain_mm_mlp_adapter: {error}; expected the projector's .bin as pretraining has saved it"
        ) from error


def _projector_type(tensors: Mapping[str, Tensor]) -> str | None:
    """The `mm_projector_type` that has such tensors; None of one that upstream does not have."""
    if set(tensors) == {"weight", "bias"}:
        return "linear"
    layers = {int(match[1]) for name in tensors if (match := re.fullmatch(r"(\d+)\.(weight|bias)", name))}
    is_mlp = layers and len(tensors) == 2 * len(layers) and layers == set(range(0, 2 * len(layers), 2))
    return f"mlp{len(layers)}x_gelu" if is_mlp else None


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """[hidden size of the language model, of the tower]."""
    first = tensors.get("weight", tensors.get("0.weight"))
    return None if first is None else tuple(first.shape)
