"""The `config.json` of a model that a flag or an adapter names: a folder's, or that of a repository on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

from ..inputs import expanded, read_json


def config_file(model: str, cache_dir: str | None = None) -> Path | None:
    """Where the `config.json` of a folder or of a hub name lies; None where it cannot be had.

    What has been downloaded before is taken as it is; else it is downloaded, which loading the model would do next.
    """
    folder = expanded(model)
    if folder.is_dir():
        return folder / CONFIG_NAME if (folder / CONFIG_NAME).is_file() else None
    return hub_file(model, CONFIG_NAME, cache_dir)


def hub_file(model: str, name: str, cache_dir: str | None = None) -> Path | None:
    """Where a file of a repository on the hub lies; None where it cannot be had, as for what can be no hub name.

    What has been downloaded before is taken as it is.
    """
    if model.startswith((".", "/", "~")) or model.count("/") > 1:  # a folder, and not there
        return None
    for offline in (True, False):
        try:
            return Path(cached_file(model, name, cache_dir=cache_dir, local_files_only=offline))
        except (OSError, ValueError, TypeError):  # of no network, of no such repository, of no name for one
            continue
    return None


def config_of(model: str | None, cache_dir: str | None = None) -> dict[str, Any] | None:
    """What the `config.json` of a folder or of a hub name says; None where it cannot be had.

    Raises:
        MixLoraError: it is damaged.
    """
    file = config_file(model, cache_dir) if model else None
    return None if file is None else read_json(file)


def absolute(model: str) -> str:
    """A folder's name that holds in every working directory; a hub name as it is."""
    folder = expanded(model)
    return str(folder.absolute()) if folder.is_dir() else model
