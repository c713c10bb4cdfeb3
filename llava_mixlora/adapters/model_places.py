"""Where the base and the vision tower lie that an adapter, or a whole LLaVA, names.

A folder is looked for from the adapter on, upwards, and then from the working directory: who moves a project moves the
adapter, its base and its tower together. The hub is only asked for what can be a name there and no folder.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME

from ..errors import MixLoraError
from ..inputs import expanded
from .adapter_folder import read_fields
from .config_file import config_file, hub_file

OF_ADAPTER = ("*.json", "*.safetensors", "*.bin", "*.model")
"""Files of an adapter's repository that loading it may read."""


def base_model_of(folder: str | Path, model_base: str | None = None, flag: str = "--model-base") -> str:
    """The base model of an adapter: `model_base` where given, else the one that its configuration names.

    Args:
        folder: the adapter's.
        model_base: what the user says.
        flag: how the user says it.

    Returns:
        A folder that is there, or a hub name.

    Raises:
        MixLoraError: neither names one, or it is nowhere to be found.
    """
    if model_base:
        return _typed(model_base, flag)
    recorded = read_fields(folder).get("base_model_name_or_path")
    if not recorded:
        raise MixLoraError(f"{folder}: its {CONFIG_NAME} names no base model; pass {flag}")
    return _recorded(recorded, [Path(folder)], f"base model, which the {CONFIG_NAME} of {folder} names", flag)


def vision_tower_of(folder: str | Path, recorded: str, vision_tower: str | None = None, base: str | None = None) -> str:
    """The vision tower of a LLaVA: `vision_tower` where given, else the one that its `config.json` names.

    Args:
        folder: the adapter's, or that of a whole LLaVA.
        recorded: the tower that its configuration names.
        vision_tower: what the user says.
        base: the adapter's base, beside which a tower may lie as well.

    Returns:
        A folder that is there, or a hub name.

    Raises:
        MixLoraError: it is nowhere to be found.
    """
    if vision_tower:
        return _typed(vision_tower, "--vision-tower")
    beside = [Path(folder), *([Path(base)] if base else [])]
    return _recorded(recorded, beside, f"vision tower, which the config.json of {folder} names", "--vision-tower")


def adapter_of(model: str) -> str:
    """`model`; or where it lies here if that is the hub name of an adapter, which is downloaded where it is not yet.

    Raises:
        MixLoraError: the adapter cannot be had.
    """
    if expanded(model).exists() or hub_file(model, CONFIG_NAME) is None:
        return model
    try:
        return snapshot_download(model, allow_patterns=OF_ADAPTER)
    except Exception as error:  # no network, no access: the hub's client has a type for each
        reason = " ".join(str(error).split())[:200]
        raise MixLoraError(f"{model}: the adapter cannot be had from the hub ({reason}); pass its folder") from error


def looks_like_folder(name: str) -> bool:
    """Whether a name can be no hub name, which is `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def _typed(name: str, flag: str) -> str:
    if looks_like_folder(name) and not expanded(name).exists():
        raise MixLoraError(f"{flag} {name}: no such folder; expected a model or a hub name like owner/name")
    return name


def _recorded(name: str, beside: list[Path], what: str, flag: str) -> str:
    place = expanded(name)
    found = next(filter(Path.is_dir, [place] if place.is_absolute() else _candidates(place, beside)), None)
    if found is not None:
        return str(found)
    if looks_like_folder(name):
        raise MixLoraError(f"{name}: no such folder: the {what}; pass its place as {flag}")
    if config_file(name) is None:
        raise MixLoraError(
            f"{name}: no such folder here or beside the model, nor can it be had from the hub: the {what}; pass its "
            f"place as {flag}"
        )
    return name


def _candidates(place: Path, beside: list[Path]) -> list[Path]:
    """A relative folder as seen from a folder, its parent and so on; and from the working directory."""
    starts = [folder.absolute() for folder in beside if folder.is_dir()]
    anchors = [anchor for start in starts for anchor in (start, *start.parents)]
    return [anchor / place for anchor in (*anchors, Path.cwd())]
