"""The record that a run of `llava.train.train` leaves beside its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.adapter_record import IMAGE_FLAGS, AdapterRecord, known_model
from ..llava_package import ORIGINAL, part, used
from .resuming import Run


def run_record(base: str, config: Any, run: Run | None, cache_dir: str | None = None) -> AdapterRecord:
    """What a run trains with; takes a second at 7B, for the fingerprints of base and tower.

    Args:
        base: the folder or hub name of the base.
        config: the configuration of the model that is trained, a LLaVA's.
        run: what its checkpoints tell of it, with its data; None in the processes that are not told.
        cache_dir: where the hub's files lie.
    """
    tower = getattr(config, "mm_vision_tower", None)
    return AdapterRecord(
        conversation=_template(),
        base=known_model(base, cache_dir),
        vision_tower=known_model(tower, cache_dir) if tower else None,
        images={name: getattr(config, name) for name in IMAGE_FLAGS if getattr(config, name, None) is not None},
        data={} if run is None else _data(run),
        package=None if used().name == ORIGINAL else used().name,
    )


def _template() -> str | None:
    """The name of the template that upstream's train() has chosen by its flag --version."""
    conversation = part("llava.conversation")
    chosen = conversation.default_conversation
    return next((name for name, template in conversation.conv_templates.items() if template is chosen), None)


def _data(run: Run) -> dict[str, Any]:
    given = run.flags.get("data_path")
    names = given if isinstance(given, list) else [given] if given else []  # some forks take several files
    return {"name": ", ".join(Path(name).name for name in names) or None, "samples": run.samples, "sha256": run.data}
