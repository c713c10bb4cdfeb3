"""What an adapter was trained with, in a file beside it that other programs ignore, so that it is used with the same.

A merged checkpoint has one too: that of its adapter, with what was merged into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import MixLoraError
from ..inputs import expanded, read_json
from ..own_files import own_file
from ..writing import write_whole
from .config_file import config_file
from .fingerprints import Fingerprint, fingerprint

RECORD = "adapter_record.json"
VERSION = version("llava-mixlora")
FORMAT = 1
"""Grows when a reader of before could take a record for something else; further fields do not need it."""
LONGEST = 4096  # letters of a name, which messages repeat
IMAGE_FLAGS = (
    *("image_aspect_ratio", "image_grid_pinpoints", "mm_vision_select_layer", "mm_vision_select_feature"),
    *("mm_use_im_start_end", "mm_use_im_patch_token", "mm_projector_type"),
)
"""How LLaVA shows an image to the model, by the names in its configuration."""


@dataclass(frozen=True)
class KnownModel:
    """A base or a vision tower: its name or absolute folder, its commit on the hub, and its fingerprint."""

    name_or_path: str
    is_folder: bool = False
    revision: str | None = None
    fingerprint: Fingerprint | None = None

    def __str__(self) -> str:
        return self.name_or_path + (f" at revision {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged into a checkpoint: its folder, and a fingerprint of its tensors."""

    name: str
    weights: str | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """What training was done with; None or empty what is not known.

    Args:
        conversation: the template, as `--version` of training and `--conv-mode` of upstream's programs name it.
        base: the model that the adapter was trained on.
        vision_tower: the tower that it saw images through.
        images: by the names of [`IMAGE_FLAGS`], how they were shown.
        data: name of the file, number of samples, and SHA-256 of their ids, texts, image names and tasks.
        merged: what was merged into the checkpoint that this record lies in.
        package: the LLaVA that trained it, by the name of its package, where that is a fork under another name.
        version: of the plugin.
        format: see [`FORMAT`].
    """

    conversation: str | None = None
    base: KnownModel | None = None
    vision_tower: KnownModel | None = None
    images: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    merged: tuple[MergedAdapter, ...] = ()
    package: str | None = None
    version: str = VERSION
    format: int = FORMAT

    def save(self, folder: str | Path) -> None:
        """Write `adapter_record.json` into a folder."""
        told = {name: value for name, value in asdict(self).items() if (name, value) != ("package", None)}
        write_whole(Path(folder) / RECORD, json.dumps(told, indent=2) + "\n")

    def with_merged(self, adapter: MergedAdapter, before: AdapterRecord | None) -> AdapterRecord:
        """That of the checkpoint which merging `adapter` makes, of a base whose own record is `before`."""
        return replace(self, merged=(*(before.merged if before else ()), adapter))


def known_model(model: str, cache_dir: str | None = None) -> KnownModel:
    """A folder or hub name as a record tells it."""
    folder = expanded(model)
    file = config_file(model, cache_dir)
    # .../snapshots/COMMIT/config.json, as the hub's cache lays files out
    revision = file.parent.name if file is not None and file.parent.parent.name == "snapshots" else None
    name = str(folder.absolute()) if folder.is_dir() else model
    return KnownModel(name, folder.is_dir(), revision, fingerprint(model, cache_dir))


def read_record(model: str | Path, cache_dir: str | None = None) -> AdapterRecord | None:
    """That of an adapter or merged checkpoint, by its folder or hub name; None where it has none.

    Raises:
        MixLoraError: the file is damaged or a link out of the folder, or a newer version of the plugin wrote it.
    """
    file = _record_file(str(model), cache_dir)
    if file is None:
        return None
    contents = read_json(file)
    if not isinstance(contents.get("format"), int) or contents["format"] > FORMAT:
        told, of = (_shown(contents.get(name)) for name in ("format", "version"))
        raise MixLoraError(
            f"{file} says format={told}, written by llava-mixlora {of}, and this is {VERSION}, which reads up to "
            f"{FORMAT}; install that version or a newer one"
        )
    try:
        return AdapterRecord(
            conversation=_text(contents, "conversation"),
            base=_model(contents.get("base")),
            vision_tower=_model(contents.get("vision_tower")),
            images=dict(contents.get("images") or {}),
            data=_data(contents),
            merged=tuple(MergedAdapter(_text(each, "name"), _text(each, "weights")) for each in contents["merged"]),
            package=_text(contents, "package"),
            version=_text(contents, "version"),
            format=contents["format"],
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise MixLoraError(
            f"{file} is damaged ({error}); copy it again, or remove it to load the adapter without its record"
        ) from error


def _record_file(model: str, cache_dir: str | None) -> Path | None:
    folder = expanded(model)
    if folder.is_dir():
        return own_file(folder, RECORD)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        return None
    try:
        return Path(cached_file(model, RECORD, cache_dir=cache_dir))
    except (OSError, ValueError, TypeError):  # of no network, of no such file or repository
        return None


def _model(contents: Mapping[str, Any] | None) -> KnownModel | None:
    if contents is None:
        return None
    found = contents["fingerprint"]
    name, revision = _text(contents, "name_or_path"), _text(contents, "revision")
    if name is None:
        raise KeyError("name_or_path")
    return KnownModel(name, bool(contents["is_folder"]), revision, found and _fingerprint(found))


def _data(contents: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(contents.get("data") or {})
    for name in ("name", "sha256"):
        _text(found, name)
    if not isinstance(found.get("samples"), (int, type(None))):
        raise TypeError(f"samples={_shown(found['samples'])} is no number")
    return found


def _fingerprint(contents: Mapping[str, Any]) -> Fingerprint:
    mappings = {name: contents.get(name) for name in ("config", "tokenizer", "image_processing")}
    if not all(found is None or isinstance(found, dict) for found in mappings.values()):
        raise TypeError("a fingerprint's parts are objects")
    return Fingerprint(mappings["config"] or {}, _text(contents, "weights"), *list(mappings.values())[1:])


def _text(contents: Mapping[str, Any], name: str) -> str | None:
    value = contents.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= LONGEST and value.isprintable()):
        raise TypeError(f"{name}={_shown(value)} is no text in one line of up to {LONGEST} letters")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:100]
