"""LLaVA's own plain LoRA, checked as far as a MIXLORA adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MixLoraError
from ..method.stored_tensors import (
    FLOATS,
    Form,
    Widths,
    check_complete,
    check_form,
    check_known,
    is_beside_the_pools,
)

LORA = "LORA"
OF_LORA = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "lora_bias"),
    *("fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern"),
}
"""Fields of a plain LoRA that are taken; others replicate layers, start from a decomposed base, or name modules."""
LARGEST_RANK = 1 << 16
MARKER = ".lora_"
WHOLE = ("lora_A.weight", "lora_B.weight")


def check_lora(config: Any, found: Mapping[str, Form], place: Path, layers: Mapping[str, Widths] | None) -> None:
    """As `method.stored_tensors.check_tensors`, of a plain LoRA.

    `found`: the tensors' forms by their names in the base model.

    Raises:
        MixLoraError: tensors are unknown, of another form, or missing.
    """
    of_layers: dict[str, set[str]] = {}
    for name in found:
        layer, marker, part = name.partition(MARKER)
        if marker:
            of_layers.setdefault(layer, set()).add(f"{MARKER[1:]}{part}")
    if not of_layers:
        raise MixLoraError(f"{place} holds no tensors of a LoRA; copy it again or train again")
    of_module = [name for name in found if is_beside_the_pools(name, config.bias, config.modules_to_save)]
    strange = [name for name in found if name.partition(MARKER)[0] not in (layers or of_layers)]
    check_known(found, place, [name for name in strange if name not in of_module])
    missing: list[str] = []
    for layer in {**dict.fromkeys(layers or ()), **dict.fromkeys(of_layers)}:
        if not any(part.startswith("lora_embedding_") for part in of_layers.get(layer, ())):
            widths = (layers or {}).get(layer, Widths(None, None, None))
            missing += _check_pair(layer, found, widths, place)
    check_complete(missing, len(found) + len(missing), place)


def _check_pair(layer: str, found: Mapping[str, Form], widths: Widths, place: Path) -> list[str]:
    """A layer's two matrices, which have one rank; returns the names of those that are missing."""
    names = [f"{layer}.{part}" for part in WHOLE]
    for name, shape in zip(names, ((None, widths.d_in), (widths.d_out, None))):
        if name in found and len(found[name].shape) == 2:  # those of convolutions have more sizes
            check_form(name, found[name], shape, FLOATS, place)
        elif name in found:
            check_form(name, found[name], (None,) * max(2, len(found[name].shape)), FLOATS, place)
    pair = [found[name].shape for name in names if name in found]
    if len(pair) == 2 and pair[0][0] != pair[1][1]:
        raise MixLoraError(
            f"{place}: {names[0]} has the shape {list(pair[0])} and {names[1]} {list(pair[1])}, which have no rank in "
            "common; are its files of different adapters, or is it damaged?"
        )
    return [name for name in names if name not in found]
