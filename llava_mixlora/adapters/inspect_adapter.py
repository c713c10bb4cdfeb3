"""`llava-mixlora inspect`: what a saved adapter is, holds, and has done with its factors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..inputs import add_allow_incomplete
from ..method.config import MixLoraConfig
from ..method.model_card import settings_of
from ..method.routing_statistics import POOLS, dead_share, usage_balance, usage_entropy
from ..method.stored_tensors import allowing_incomplete
from ..method.tensor_names import FURTHER, KINDS, PEFT_PREFIX, STATISTICS, USAGE, by_number
from ..method.word_centre import WARM_UP, WORDS
from .adapter_folder import weights_of
from .adapter_record import AdapterRecord, read_record
from .reading import read_mixlora
from .score_spread import INPUTS, ScoreSpread, score_spread

BESIDE = "beside the adapter"  # non_lora_trainables.bin
SETTINGS_IN_A_LINE = 6
TASKS_NAMED = 12  # of an adapter with more tasks, so many are named
MEAN = "mean over the layers"


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe the command `inspect` to its parser."""
    parser.description = (
        "Print an adapter's configuration, its parameters by kind, and per layer how its routers used the factors in "
        "training: entropy of the choices (1: all alike), dead (share of factors never chosen) and balance (share of "
        "the pool in effective use), for pools A and B. With routing 'ifs_cfs' also how far the scores of CFS are "
        "spread beside those of IFS: B factors are ranked by the sum of both, so a spread that is far smaller decides "
        "next to nothing."
    )
    parser.epilog = "example: llava-mixlora inspect output/llava-mixlora"
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    add_allow_incomplete(parser)
    parser.set_defaults(command=_inspect)


def _inspect(given: argparse.Namespace) -> None:
    with allowing_incomplete(given.allow_incomplete):
        print("\n".join(describe(given.adapter)))


@dataclass
class AdapterContents:
    """A saved adapter, without its weights.

    `parameters`: their number by kind (pool A, pool B, routers, cfs, further adapter weights, beside the adapter).
    `usage`: int64 [2, E] by layer, as in [`MixLoraLayer`]; layers that have not been counted in training are left out.
    `spread`: by layer, of an adapter with `routing="ifs_cfs"`. `word_instances`: how many instances made the centre of
    the word vectors; None where routers see none.
    """

    config: MixLoraConfig
    parameters: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    usage: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, ScoreSpread] = field(default_factory=dict)
    word_instances: int | None = None


def read_contents(folder: str | Path) -> AdapterContents:
    """Read what `folder` holds.

    Raises:
        MixLoraError: it is no MIXLORA adapter, its format is newer, one of its files is damaged, or tensors are
            missing.
    """
    adapter = read_mixlora(folder)
    contents = AdapterContents(adapter.config)
    kinds = dict.fromkeys((*KINDS.values(), FURTHER, BESIDE), 0)
    with safe_open(str(weights_of(folder)), framework="pt") as tensors:
        names = sorted(tensors.keys(), key=by_number)
        for name in names:
            layer, _, parameter = name.rpartition(".")
            if name.endswith(USAGE):
                usage = tensors.get_tensor(name)
                if usage.any():
                    contents.usage[layer.removeprefix(PEFT_PREFIX)] = usage
            elif parameter == WORDS:
                contents.word_instances = int(tensors.get_tensor(name)[-1])
            elif STATISTICS not in name:
                kinds[KINDS.get(parameter, FURTHER)] += math.prod(tensors.get_slice(name).get_shape())
            contents.layers += parameter == "mixlora_A"
            others = [f"{layer}.mixlora_{part}" for part in ("A", "router_B", "cfs")]
            if parameter == "mixlora_cfs" and all(other in names for other in others):
                weights = (tensors.get_tensor(other) for other in others)
                contents.spread[layer.removeprefix(PEFT_PREFIX)] = score_spread(contents.config, *weights)
    kinds[BESIDE] = sum(tensor.numel() for tensor in adapter.beside.values())
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
    if (record := read_record(folder)) is not None:
        yield from _record_lines(record)
    yield f"adapted layers: {contents.layers}"
    shown = [f"{name}={value}" for name, value in settings_of(config).items() if name != "tasks"]
    shown.append(f"format_version={config.format_version}")
    for first in range(0, len(shown), SETTINGS_IN_A_LINE):
        yield "  ".join(shown[first : first + SETTINGS_IN_A_LINE])
    if config.tasks:
        rest = ", ..." if len(config.tasks) > TASKS_NAMED else ""
        yield f"tasks ({len(config.tasks)}): {', '.join(config.tasks[:TASKS_NAMED])}{rest}"
    if contents.word_instances is not None:
        settled = "settled" if contents.word_instances >= WARM_UP else f"it settles at {WARM_UP}"
        yield f"centre of the word vectors: mean over {contents.word_instances:,} instances of training ({settled})"
    yield ""
    yield f"{'parameters':<20}{'number':>14}"
    for kind, number in contents.parameters.items():
        yield f"{kind:<20}{number:>14,}"
    yield f"{'total':<20}{sum(contents.parameters.values()):>14,}"
    yield ""
    if contents.spread:
        yield from _spread_lines(contents.spread)
        yield ""
    if contents.usage:
        yield from _usage_lines(contents)
    else:
        yield "no statistics: the adapter was saved untrained, by an older version, or converted"


def _record_lines(record: AdapterRecord) -> Iterator[str]:
    """What training was done with, of what the record tells."""
    told = {
        "conversation template": record.conversation,
        "vision tower": record.vision_tower,
        "data": record.data and f"{record.data.get('name')}, {record.data.get('samples')} samples",
        "trained with llava-mixlora": record.version,
    }
    yield from (f"{what}: {value}" for what, value in told.items() if value)


def _spread_lines(spread: dict[str, ScoreSpread]) -> Iterator[str]:
    yield (
        f"scores that rank B factors, for {INPUTS} random inputs of unit rms (fixed seed) and r random A factors each: "
        "standard deviations"
    )
    yield "over the B factors, which decide; of p_B over the inputs, and of p_AB over the chosen A factors"
    rows = {layer: list(figures) for layer, figures in spread.items()}
    yield from _table("CFS beside IFS", ("p_B", "p_B inputs", "p_AB", "p_AB chosen"), rows, ".2e")


def _usage_lines(contents: AdapterContents) -> Iterator[str]:
    pools = POOLS
    title = "routing in training"
    if contents.config.pairing == "same":
        pools, title = ("A+B",), f"{title} (one choice for both pools)"
    columns = [f"{name} {pool}" for pool in pools for name in ("entropy", "dead", "balance")]
    rows, instances = {}, {}
    for layer, usage in contents.usage.items():
        usage = usage[: len(pools)]
        rows[layer] = _figures(usage)
        instances[layer] = f"{int(usage[0].sum()) // contents.config.rank_of(layer):,}"
    yield from _table(title, columns, rows, ".3f", ("instances", instances))


def _figures(usage: Tensor) -> list[float]:
    columns = zip(usage_entropy(usage).tolist(), dead_share(usage).tolist(), usage_balance(usage).tolist())
    return [figure for pool in columns for figure in pool]


def _table(
    title: str,
    columns: Sequence[str],
    rows: dict[str, list[float]],
    form: str,
    counts: tuple[str, dict[str, str]] | None = None,
) -> Iterator[str]:
    """A line for each layer and their mean; `counts`: a column before the others, which has no mean."""
    width = max(map(len, [*rows, title, MEAN]))
    head, column = counts or ("", {})

    def line(name: str, count: str, cells: Iterable[str]) -> str:
        return "  ".join([f"{name:<{width}}", *([f"{count:>9}"] if counts else []), *(f"{cell:>11}" for cell in cells)])

    yield line(title, head, columns)
    for layer, figures in rows.items():
        yield line(layer, column.get(layer, ""), (format(figure, form) for figure in figures))
    means = torch.tensor(list(rows.values())).mean(dim=0).tolist()
    yield line(MEAN, "", (format(mean, form) for mean in means))
