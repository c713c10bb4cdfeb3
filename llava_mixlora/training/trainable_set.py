"""What a run of adapters trains: the adapter, and what LLaVA stores beside it. Nothing of the base."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from peft import PeftModel

from ..errors import MixLoraError

BESIDE = ("mm_projector", "vision_resampler", "image_newline", "embed_tokens", "lm_head", "modules_to_save")
"""Parts of the names that `get_peft_state_non_lora_maybe_zero_3` stores beside an adapter, and that may be trained."""

PARTS, PROJECTOR = "mm_tunable_parts", "mm_mlp_adapter"
"""A flag of LLaVA-NeXT, and the part beside which an adapter is trained."""
FREEZING = ("tune_mm_mlp_adapter", "tune_mm_vision_resampler", PARTS, "trainer_mode")
THAWING = (PARTS, "unfreeze_mm_vision_tower", "unfreeze_language_model")


def _freeze_what_gets_no_gradient(model: PeftModel) -> None:
    """Freeze a vision tower that runs under `torch.no_grad()`: some make parameters anew after they have frozen it."""
    llava = model.get_base_model()
    tower = llava.get_vision_tower() if hasattr(llava, "get_vision_tower") else None
    if tower is None or "no_grad" not in inspect.getsource(type(tower).forward):
        return
    if not all(parameter.requires_grad for parameter in tower.parameters()):  # else a flag unfroze it
        tower.requires_grad_(False)


def thaw_beside(model: PeftModel, given: Mapping[str, str], arguments: Any) -> None:
    """Train the adapter too where `--mm_tunable_parts` names the projector alone: some LLaVAs freeze all else by it.

    Args:
        model: the adapted model.
        given: the words of the flags that are given, by name.
        arguments: the Trainer's, which some save a checkpoint of the projector alone by.
    """
    prefix = model.base_model.prefix
    if given.get(PARTS) != PROJECTOR:
        return
    for name, parameter in model.named_parameters():
        if prefix in name:
            parameter.requires_grad_(True)
    vars(arguments).pop(PARTS, None)


def check_trainable(model: PeftModel, given: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse a model whose adapter is frozen, or of whose base more than LLaVA's own is trained.

    Args:
        model: the adapted model.
        given: the words of the flags that are given, by name, for the message.

    Raises:
        MixLoraError: names the flags that lead to it, or the first parameter of the base and their number.
    """
    _freeze_what_gets_no_gradient(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = model.peft_config[model.active_adapter]
    prefix = model.base_model.prefix
    if not any(prefix in name for name in trained):
        raise MixLoraError(
            f"{_named(FREEZING, given)}nothing of the {config.peft_type.value} adapter would be trained; "
            f"{_instead(FREEZING, given, 'freezes')}"
        )
    has_bias = config.bias != "none"
    of_base = [
        name
        for name in trained
        if prefix not in name and not any(part in name for part in BESIDE) and not (has_bias and name.endswith(".bias"))
    ]
    if of_base:
        raise MixLoraError(
            f"{_named(THAWING, given)}{len(of_base)} parameters of the base would be trained beside the adapter, such "
            f"as {of_base[0]}; {_instead(THAWING, given, 'unfreezes')}"
        )


def _named(flags: Sequence[str], given: Mapping[str, str]) -> str:
    words = [f"--{flag} {given[flag]}" for flag in flags if given.get(flag, "False") != "False"]
    return f"{' '.join(words)}: " if words else ""


def _instead(flags: Sequence[str], given: Mapping[str, str], does: str) -> str:
    if PARTS in given:
        return f"write --{PARTS} {PROJECTOR}, which trains the adapter and the projector, or leave the flag out"
    return f"leave out {', '.join(f'--{flag}' for flag in flags)} and whatever else {does} the model"
