"""What modules and tensors of upstream's LLaVA are called in transformers' own.

    upstream's LLaVA                in the model (transformers 4.52 and newer)  in its checkpoint
    model.layers.0                  model.language_model.layers.0               language_model.model.layers.0
    lm_head                         lm_head                                     language_model.lm_head
    model.mm_projector.0 (2)        model.multi_modal_projector.linear_1 (2)    multi_modal_projector.linear_1 (2)
    model.vision_tower.vision_tower model.vision_tower                          vision_tower.vision_model

Checkpoints keep the names of transformers 4.36, which every version since and vLLM read; adapters are stored under the
names that the model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PROJECTOR = {"0": "linear_1", "2": "linear_2"}
"""The linear layers of upstream's projector, by their places in it, and transformers' names for them."""
OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NATIVE_LAYER = re.compile(r"model\.language_model\.layers\.\d+\..+")
MODULE = re.compile(r"model\.(language_model|multi_modal_projector|vision_tower)\.(.+)")
"""Names in transformers' class, but for the head."""
_LAYERS_OF_PATTERN = re.compile(r"\bmodel(\\?\.)layers\b")
_NATIVE_LAYERS_OF_PATTERN = re.compile(r"\bmodel(\\?\.)language_model\\?\.layers\b")


def native_name(name: str) -> str:
    """Of a module or parameter of upstream's LLaVA, the name that it has in transformers' class."""
    if match := re.fullmatch(r"model\.mm_projector\.(\d)\.(.+)", name):
        return f"model.multi_modal_projector.{PROJECTOR[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"model\.mm_projector\.(weight|bias)", name):  # of one layer
        return f"model.multi_modal_projector.linear_1.{match[1]}"
    return re.sub(r"^model\.(?!vision_tower\.)", "model.language_model.", name)


def upstream_name(name: str) -> str:
    """The other way: of a module or parameter of transformers' class, the name that upstream's LLaVA has for it."""
    match = MODULE.fullmatch(name)
    if match is None or match[1] == "vision_tower":
        return name
    if match[1] == "language_model":
        return f"model.{match[2]}"
    layer, _, rest = match[2].partition(".")
    place = next((number for number, native in PROJECTOR.items() if native == layer), layer)
    return f"model.mm_projector.{place}.{rest}"


def stored_name(name: str) -> str:
    """Of a name that the model has, the one that its checkpoint has."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    inner = name.removeprefix("model.")
    if inner.startswith("language_model."):
        return inner.replace("language_model.", "language_model.model.", 1)
    return inner.replace("vision_tower.", "vision_tower.vision_model.", 1)


def module_name(name: str) -> str:
    """Of a name in a checkpoint of transformers' LLaVA, of any version, the one that the model has for it."""
    if re.match(r"model\.|lm_head\.", name):
        return name
    if (inner := name.removeprefix("language_model.lm_head.")) != name:
        return f"lm_head.{inner}"
    return "model." + name.replace("language_model.model.", "language_model.", 1).replace("vision_model.", "", 1)


def native_saved(module: str) -> str:
    """A name in `modules_to_save` of an adapter of upstream's LLaVA, for transformers' class."""
    if match := re.fullmatch(r"(model\.)?mm_projector(?:\.(\d))?", module):
        return f"{match[1] or ''}multi_modal_projector" + (f".{PROJECTOR[match[2]]}" if match[2] else "")
    return native_name(module)


def upstream_saved(modules: Iterable[str]) -> list[str]:
    """The other way, of all of them but the projector, which upstream saves beside its adapters."""
    of_projector = re.compile(r"(.+\.)?(multi_modal_projector|linear_1|linear_2)(\..+)?")
    return [
        re.sub(r"^(model\.)?language_model\.", "model.", module)
        for module in modules
        if not of_projector.fullmatch(module)
    ]


def native_patterns(patterns: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` of an adapter of upstream's LLaVA, for transformers' class.

    `layers`: those that it adapts, as upstream's LLaVA calls them.
    """
    renamed = {_LAYERS_OF_PATTERN.sub(r"model\1language_model\1layers", key): patterns[key] for key in patterns}
    return _of_equal_effect(patterns, renamed, {layer: native_name(layer) for layer in layers})


def upstream_patterns(patterns: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """The other way. `layers`: as upstream's LLaVA calls them."""
    renamed = {_NATIVE_LAYERS_OF_PATTERN.sub(r"model\1layers", key): patterns[key] for key in patterns}
    return _of_equal_effect(patterns, renamed, {native_name(layer): layer for layer in layers})


def _of_equal_effect(patterns: Mapping[str, Any], renamed: dict[str, Any], layers: Mapping[str, str]) -> dict[str, Any]:
    """The renamed patterns where they say the same of each layer, or else the layers' names. `layers`: old and new."""
    wanted = {new: _first_match(patterns, old) for old, new in layers.items()}
    if all(_first_match(renamed, new) == value for new, value in wanted.items()):
        return renamed
    return {new: value for new, value in wanted.items() if value is not None}


def _first_match(patterns: Mapping[str, Any], layer: str) -> Any:
    """As PEFT looks for what a layer has."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)


def targets_of(layers: Iterable[str]) -> str | list[str]:
    """`target_modules` that name exactly these layers of upstream's, in transformers' class: one expression, if it can.

    `layers`: as upstream's LLaVA calls them.
    """
    layers = sorted(layers)
    matches = [OF_LAYER.fullmatch(layer) for layer in layers]
    if not all(matches):
        return [native_name(layer) for layer in layers]
    numbers, kinds = ({match[group] for match in matches} for group in (1, 2))
    if len(layers) != len(numbers) * len(kinds):
        return [native_name(layer) for layer in layers]
    return rf"model\.language_model\.layers\.({_either(numbers)})\.({_either(kinds)})"


def _either(parts: Iterable[str]) -> str:
    return "|".join(re.escape(part) for part in sorted(parts, key=lambda part: (len(part), part)))
