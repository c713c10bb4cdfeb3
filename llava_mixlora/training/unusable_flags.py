"""Flags of a run that upstream takes, and then ignores, misunderstands, or makes a result of that nobody can use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import MixLoraError

Given = Mapping[str, Any]

ASPECT_RATIOS = ("square", "pad")
FEATURES = ("patch", "cls_patch")
PROJECTORS = r"linear|identity|mlp\d+x_gelu"
BIASES = ("none", "all", "lora_only")


def check_usable(given: Given, defaults: Given, templates: Collection[str]) -> None:
    """Refuse such flags of a run that trains an adapter.

    Args:
        given: the values of the flags that are given, by name.
        defaults: upstream's defaults of all flags that it has.
        templates: the names of upstream's conversation templates, for `--version`.

    Raises:
        MixLoraError: names the first of them, and what to do instead.
    """
    _check_version(given, templates)
    _check_words(given, defaults)
    for flag, (is_wrong, what_to_do) in WITHOUT_EFFECT.items():
        if flag in given and is_wrong(given):
            raise MixLoraError(f"--{flag} {given[flag]}: {what_to_do}")


def _check_version(given: Given, templates: Collection[str]) -> None:
    known = {*templates, "v0", "v0.5"}
    version = given.get("version")
    if version is not None and version not in known:
        nearest = difflib.get_close_matches(version, known, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise MixLoraError(
            f"--version {version}: no conversation template of LLaVA, which would silently take vicuna_v1; {hint}"
            f"expected one of {', '.join(sorted(known))}"
        )


def _check_words(given: Given, defaults: Given) -> None:
    cuts_tiles = "image_grid_pinpoints" in defaults  # a fork whose training knows anyres, and more
    if not cuts_tiles and (aspect := given.get("image_aspect_ratio", "square")) not in ASPECT_RATIOS:
        raise MixLoraError(
            f"--image_aspect_ratio {aspect}: LLaVA's training knows only square (a crop) and pad, and takes all others "
            "for square; give --image_aspect_ratio pad or square"
        )
    if not cuts_tiles and (merge := given.get("mm_patch_merge_type", "flat")) != "flat":
        raise MixLoraError(
            f"--mm_patch_merge_type {merge}: it merges the tiles of anyres images, which LLaVA's training does not "
            "make; leave the flag out"
        )
    if (feature := given.get("mm_vision_select_feature", "patch")) not in FEATURES:
        raise MixLoraError(f"--mm_vision_select_feature {feature}: expected one of {', '.join(FEATURES)}")
    if not cuts_tiles and not re.fullmatch(PROJECTORS, projector := given.get("mm_projector_type", "linear")):
        raise MixLoraError(f"--mm_projector_type {projector}: expected linear, identity or mlp2x_gelu (LLaVA 1.5's)")
    if (bias := given.get("lora_bias", "none")) not in BIASES:
        raise MixLoraError(f"--lora_bias {bias!r}: expected one of {', '.join(BIASES)}")


def _evaluates_nothing(given: Given) -> bool:
    asked = given.get("eval_strategy", given.get("evaluation_strategy"))
    return getattr(asked, "value", asked) != "no" and not given.get("eval_data_path")


NO_EVALUATION = "there is no data to evaluate on; give --eval_data_path HELDOUT.json, or leave the flag out"
WITHOUT_EFFECT: dict[str, tuple[Callable[[Given], bool], str]] = {
    "tune_mm_mlp_adapter": (
        lambda given: given["tune_mm_mlp_adapter"],
        "trains the projector alone and freezes the adapter; leave the flag out, as the projector is trained beside an "
        "adapter anyway, or pretrain a projector without --mixlora_enable and --lora_enable",
    ),
    "lora_weight_path": (
        lambda given: bool(given["lora_weight_path"]),
        "LLaVA declares this flag and never reads it; leave it out (--mixlora_init_from goes on with a MixLoRA adapter "
        "on new data, and the same --output_dir from its own checkpoints)",
    ),
    "batch_eval_metrics": (
        lambda given: given["batch_eval_metrics"],
        "held-out metrics are summed batch by batch anyway, and Trainer's way of it takes other ones; leave it out",
    ),
    "evaluation_strategy": (_evaluates_nothing, NO_EVALUATION),
    "eval_strategy": (_evaluates_nothing, NO_EVALUATION),
}
"""By flag: when it is wrong, and why, with what to do."""
