"""The weights of a whole model, written in shards: never more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..writing import save_tensors

SHARD_SIZE = 2 << 30  # bytes


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors by name into a folder, as transformers lays a model out: one file, or shards and their index."""
    shards: list[list[str]] = []
    total = 0

    def write(shard: dict[str, Tensor]) -> None:
        shards.append(list(shard))
        save_tensors(shard, folder / f"shard-{len(shards)}")

    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > SHARD_SIZE:
            write(shard)
            shard, filled = {}, 0
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)  # apart from a storage that others share
        filled += size
        total += size
    write(shard)
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / SAFE_WEIGHTS_NAME)
        return
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
