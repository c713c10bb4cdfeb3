"""What `llava-mixlora doctor --estimate` tells: the memory that a run will need, before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .memory_estimate import REFUSED, STAGES, MemoryEstimate

GIB = 2**30
COMPONENTS = {
    "base": "language model, frozen",
    "tower": "vision tower, frozen",
    "trained": "trained parameters",
    "gradients": "their gradients",
    "optimizer": "optimizer state",
    "activations": "activations at the peak",
}


def describe(name: str, result: MemoryEstimate) -> Iterator[str]:
    """The lines that `llava-mixlora doctor --estimate` prints."""
    settings = result.settings
    checkpointing = "on" if settings.gradient_checkpointing else "off"
    yield f"Estimate for MixLoRA on {name}"
    cfs = f", cfs {settings.cfs}" if settings.routing == "ifs_cfs" else ""
    yield (
        f"{settings.routing}, pairing {settings.pairing}, router input {settings.router_input}{cfs}, "
        f"num_factors {settings.num_factors}, r {settings.r}"
    )
    yield (
        f"per GPU {settings.batch_size} x {settings.sequence_length} tokens, gradient checkpointing {checkpointing}; "
        f"{settings.gpus} GPU{'s' * (settings.gpus > 1)}, {settings.optimizer}, {settings.compute_dtype}"
    )
    yield from (f"note: {note}" for note in result.notes)
    yield ""
    trained = sum(result.parameters.values())
    yield f"{'trained parameters':<26}{'number':>16}"
    for kind, number in result.parameters.items():
        yield f"  {kind:<24}{number:>16,}"
    share = trained / (trained + result.frozen)
    yield f"  {'total':<24}{trained:>16,}   ({share:.2%} of all {trained + result.frozen:,})"
    yield ""
    columns = [f"{bits} bits" if bits < 16 else settings.compute_dtype for bits in result.components]
    yield f"{'GiB per GPU':<26}" + "".join(f"{column:>16}" for column in columns)
    for part, title in COMPONENTS.items():
        yield _row(title, [getattr(components, part) for components in result.components.values()])
    yield "in total, by ZeRO stage"
    for stage in STAGES:
        cells = [by_stage[stage] for by_stage in result.cells.values()]
        yield _row(stage, [None if cell.refused else cell.gpu for cell in cells])
        if any(cell.host for cell in cells):
            yield _row("  host memory per GPU", [None if cell.refused else cell.host for cell in cells])
    if any(cell.refused for by_stage in result.cells.values() for cell in by_stage.values()):
        yield f"-: {REFUSED}."
    yield "CUDA's own memory and fragmentation come on top."


def as_json(name: str, result: MemoryEstimate) -> dict[str, Any]:
    """The same in bytes, for programs."""
    return {
        "model": name,
        "settings": asdict(result.settings),
        "notes": list(result.notes),
        "parameters_trained": result.parameters,
        "parameters_frozen": result.frozen,
        "bytes_per_gpu": {bits: asdict(components) for bits, components in result.components.items()},
        "total": {
            bits: {stage: asdict(cell) for stage, cell in by_stage.items()} for bits, by_stage in result.cells.items()
        },
    }


def _row(title: str, sizes: list[int | None]) -> str:
    return f"  {title:<24}" + "".join(f"{'-' if size is None else f'{size / GIB:.2f}':>16}" for size in sizes)
