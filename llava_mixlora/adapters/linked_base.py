"""A base with another `config.json`: a folder of links to its files, for loaders that take no configuration."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from .stored_weights import StoredWeights


@contextmanager
def linked_base(base: str | Path, config: dict[str, Any]) -> Iterator[Path]:
    """A folder that holds what the base holds, but this configuration; it is there while the model is being loaded.

    Args:
        base: its folder, or its name on the hub.
    """
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(base)))
    with tempfile.TemporaryDirectory(prefix="base-") as place:
        for file in folder.iterdir():
            if file.name != CONFIG_NAME:
                (Path(place) / file.name).symlink_to(file.absolute())
        # Some loaders make the tower before the base is read, and leave it empty where the base does not hold one.
        has_tower = any("vision_tower" in name for name in StoredWeights(folder))
        config = {**config, "delay_load": not has_tower}
        (Path(place) / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        yield Path(place)
