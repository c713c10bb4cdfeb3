"""Which base an adapter was trained on, in a file beside it, and whether another model is that base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import MixLoraError
from ..inputs import read_json
from .config_file import config_file, config_of

BASE_RECORD = "base_model.json"
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Fields of a language model's configuration that decide the shapes of an adapter's tensors."""


def record_base(folder: str | Path, base: str, cache_dir: str | None = None) -> None:
    """Write `base_model.json`: the base's name, its commit on the hub, and the SHA-256 of its `config.json`.

    Each of the last two is null where it is not known.
    """
    file = config_file(base, cache_dir)
    record = {"name_or_path": base, "revision": _revision(file), "config_sha256": _sha256(file)}
    (Path(folder) / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_base(folder: str | Path, base: str, cache_dir: str | None = None) -> None:
    """Refuse a base on which the adapter in `folder` cannot be loaded; say one line of one that it was not trained on.

    A base that has moved is the same one while its `config.json` is. What is not known is not compared.

    Raises:
        MixLoraError: the base's layers have other shapes than those that the adapter's `config.json` tells.
    """
    found = config_of(base, cache_dir)
    if found is None:
        return
    trained_on = _read(Path(folder) / "config.json")
    for field in SHAPE:
        wanted = trained_on.get(field)
        if wanted is not None and field in found and found[field] != wanted:
            raise MixLoraError(
                f"{folder} was trained on a base with {field}={wanted!r}, and {base} has {found[field]!r}; pass the "
                f"base that it was trained on{_named(folder)} as --model-base"
            )
    recorded = _read(Path(folder) / BASE_RECORD).get("config_sha256")
    if recorded is not None and recorded != _sha256(config_file(base, cache_dir)):
        print(
            f"warning: {folder} was trained on another base{_named(folder)} than {base}, whose config.json differs; "
            "its answers are only right on the base of its training (--model-base)",
            flush=True,
        )


def _named(folder: str | Path) -> str:
    record = _read(Path(folder) / BASE_RECORD)
    revision = f" at revision {record['revision']}" if record.get("revision") else ""
    return f" ({record['name_or_path']}{revision})" if record.get("name_or_path") else ""


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _revision(file: Path | None) -> str | None:
    """The commit in `.../snapshots/COMMIT/config.json`, as the hub's cache lays files out."""
    return file.parent.name if file is not None and file.parent.parent.name == "snapshots" else None


def _sha256(file: Path | None) -> str | None:
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
