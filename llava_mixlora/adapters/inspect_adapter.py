"""`llava-mixlora inspect`: what a saved adapter is, holds, and has done with its factors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from ..method.config import MixLoraConfig
from ..method.routing_statistics import POOLS, dead_share, usage_balance, usage_entropy
from ..method.tensor_names import FURTHER, KINDS, PEFT_PREFIX, STATISTICS, USAGE, by_number
from .adapter_folder import check_adapter, read_config, read_non_lora_trainables

BESIDE = "beside the adapter"  # non_lora_trainables.bin
SHOWN = ("routing", "num_factors", "r", "lora_alpha", "lora_dropout", "router_gradient", "router_scope")
SHOWN_TOO = ("count_padding", "decode_routing", "cfs_product", "balance_loss_weight", "bias", "format_version")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe the command `inspect` to its parser."""
    parser.description = (
        "Print an adapter's configuration, its parameters by kind, and per layer how its routers used the factors in "
        "training: entropy of the choices (1: all alike), dead (share of factors never chosen) and balance (share of "
        "the pool in effective use), for pools A and B."
    )
    parser.epilog = "example: llava-mixlora inspect output/llava-mixlora"
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    parser.set_defaults(command=lambda given: print("\n".join(describe(given.adapter))))


@dataclass
class AdapterContents:
    """A saved adapter, without its weights.

    `parameters`: their number by kind (pool A, pool B, routers, cfs, further adapter weights, beside the adapter).
    `usage`: int64 [2, E] by layer, as in [`MixLoraLayer`]; layers that have not been counted in training are left out.
    """

    config: MixLoraConfig
    parameters: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    usage: dict[str, Tensor] = field(default_factory=dict)


def read_contents(folder: str | Path) -> AdapterContents:
    """Read what `folder` holds.

    Raises:
        MixLoraError: it is no MIXLORA adapter, its format is newer, or one of its files is damaged.
    """
    contents = AdapterContents(read_config(folder))
    check_adapter(folder)
    kinds = dict.fromkeys((*KINDS.values(), FURTHER, BESIDE), 0)
    with safe_open(str(Path(folder) / SAFETENSORS_WEIGHTS_NAME), framework="pt") as tensors:
        names = sorted(tensors.keys(), key=by_number)
        for name in names:
            layer, _, parameter = name.rpartition(".")
            if name.endswith(USAGE):
                usage = tensors.get_tensor(name)
                if usage.any():
                    contents.usage[layer.removeprefix(PEFT_PREFIX)] = usage
            elif STATISTICS not in name:
                kinds[KINDS.get(parameter, FURTHER)] += math.prod(tensors.get_slice(name).get_shape())
            contents.layers += parameter == "mixlora_A"
    kinds[BESIDE] = sum(tensor.numel() for tensor in read_non_lora_trainables(folder).values())
    contents.parameters = kinds
    return contents


def describe(folder: str | Path) -> Iterator[str]:
    """The lines that `llava-mixlora inspect` prints.

    Raises:
        MixLoraError: as [`read_contents`].
    """
    contents = read_contents(folder)
    config = contents.config
    yield f"MixLoRA adapter {folder}"
    yield f"base model: {config.base_model_name_or_path or 'not recorded'}"
    yield f"adapted layers: {contents.layers}"
    for fields in (SHOWN, SHOWN_TOO):
        yield "  ".join(f"{name}={getattr(config, name)}" for name in fields)
    yield ""
    yield f"{'parameters':<20}{'number':>14}"
    for kind, number in contents.parameters.items():
        yield f"{kind:<20}{number:>14,}"
    yield f"{'total':<20}{sum(contents.parameters.values()):>14,}"
    yield ""
    if not contents.usage:
        yield "no statistics: the adapter was saved untrained, by an older version, or converted"
        return
    width = max(map(len, [*contents.usage, "mean over the layers"]))
    figures = {layer: _figures(usage) for layer, usage in contents.usage.items()}
    columns = [f"{name} {pool}" for pool in POOLS for name in ("entropy", "dead", "balance")]
    yield f"{'routing in training':<{width}}  {'instances':>9}  " + "  ".join(f"{name:>9}" for name in columns)
    for layer, row in figures.items():
        instances = int(contents.usage[layer][0].sum()) // contents.config.rank_of(layer)
        yield f"{layer:<{width}}  {instances:>9,}  " + "  ".join(f"{figure:>9.3f}" for figure in row)
    mean = torch.tensor(list(figures.values())).mean(dim=0).tolist()
    yield f"{'mean over the layers':<{width}}  {'':>9}  " + "  ".join(f"{figure:>9.3f}" for figure in mean)


def _figures(usage: Tensor) -> list[float]:
    columns = zip(usage_entropy(usage).tolist(), dead_share(usage).tolist(), usage_balance(usage).tolist())
    return [figure for pool in columns for figure in pool]
