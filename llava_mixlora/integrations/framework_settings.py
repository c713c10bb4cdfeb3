"""What a framework's settings say of a MixLoRA adapter: read alike, whichever framework they are of."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..adapters.adapter_folder import is_mixlora_adapter, read_fields
from ..errors import MixLoraError
from ..method.config import MixLoraConfig

NAME = "mixlora"
"""The setting that holds the fields of `MixLoraConfig`, and the name of the method in the frameworks."""
PRESET = "preset"
PRESETS = {"paper": MixLoraConfig.paper, "paper_formulas": MixLoraConfig.paper_formulas}
OF_FILES = {field.name for field in dataclasses.fields(PeftConfig)} | {"peft_type", "format_version"}
"""Fields that loading and saving fill in; `task_type`, which is among them, the framework knows."""
KNOWN = (PRESET, *sorted({field.name for field in dataclasses.fields(MixLoraConfig)} - OF_FILES))


def require(module: str, package: str, needed: str) -> None:
    """Raise an ImportError that tells what to install, unless `needed`, a submodule of `module`, is there."""
    try:
        found = importlib.util.find_spec(needed)
    except ModuleNotFoundError:
        found = None
    if found is None:
        there = importlib.util.find_spec(module) is not None
        wrong = f"{package} as installed here is too old, it has no {needed}" if there else f"{package} is missing here"
        raise ImportError(f"llava_mixlora's part for {package}: {wrong}; run: pip install --upgrade {package}")


def make_config(settings: Any, of_lora: Mapping[str, Any]) -> MixLoraConfig:
    """The configuration that a framework's settings describe.

    Args:
        settings: what the user has given as `mixlora`: fields of `MixLoraConfig` by name, and `preset`, "paper" or
            "paper_formulas"; None is none of them.
        of_lora: what the framework's own settings for LoRA say (rank, scale, layers, ...), under the names of
            `MixLoraConfig`; what is None is left to its default, and `settings` come first.

    Raises:
        MixLoraError: a name is unknown, or a value cannot be.
    """
    check_names(settings)
    fields = dict(settings or {})
    preset = fields.pop(PRESET, None)
    if preset is not None and preset not in PRESETS:
        raise MixLoraError(f"{NAME}.{PRESET}={preset!r}: expected one of {', '.join(map(repr, PRESETS))}")
    given = {name: value for name, value in of_lora.items() if value is not None}
    return PRESETS.get(preset, MixLoraConfig)(**{**given, **fields})


def check_names(settings: Any) -> None:
    """Refuse settings that are no mapping, and names that are none of [`KNOWN`].

    Raises:
        MixLoraError: names the first, with the nearest that there is.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise MixLoraError(f"{NAME}={settings!r:.200}: expected settings by name, such as num_factors: 16")
    for name in settings or {}:
        if name not in KNOWN:
            nearest = difflib.get_close_matches(str(name), KNOWN, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise MixLoraError(f"{NAME}.{name}: no such setting; {hint}There are: {', '.join(KNOWN)}")


def refuse(of_lora_alone: Mapping[str, Any]) -> None:
    """Refuse what is for LoRA alone.

    Args:
        of_lora_alone: values by the framework's names; those that are None, False or empty are not set.

    Raises:
        MixLoraError: names the first that is set.
    """
    for name, value in of_lora_alone.items():
        if value not in (None, False, "", [], {}):
            raise MixLoraError(f"{name}={value!r:.200}: is for LoRA alone, and MixLoRA has no such thing; leave it out")


def check_continues(settings: Any, adapter: str | Path) -> None:
    """Compare what is set with the adapter that training or inference goes on from, whose form cannot be changed.

    Raises:
        MixLoraError: the folder holds no MixLoRA adapter, or one that was trained with something else.
    """
    if Path(adapter).is_dir() and not is_mixlora_adapter(adapter):
        raise MixLoraError(f"{adapter}: is no MIXLORA adapter, but the settings ask for MixLoRA; name one, or none")
    check_names(settings)
    if not settings or not Path(adapter).is_dir():
        return
    saved = read_fields(adapter)
    for name, value in settings.items():
        if name != PRESET and _plain(saved.get(name)) != _plain(value):
            raise MixLoraError(
                f"{NAME}.{name}={value!r:.200}, but {adapter} was trained with {saved.get(name)!r:.200}; leave it out, "
                "or train a new adapter"
            )


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value
