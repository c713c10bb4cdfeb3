"""The static stand-ins for an adapter that `merge_study` measures, in groups of what is made at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_mixlora.data.conversations import read_conversations
from llava_mixlora.data.drawing import drawn_evenly
from llava_mixlora.inference.loading import Loaded, load_for_inference
from llava_mixlora.inference.samples import Batch, SampleSource, batches, endless_batches
from llava_mixlora.merging.calibration import calibrate
from llava_mixlora.merging.distillation import STEPS, distilled
from llava_mixlora.merging.static_adapter import FROM_STATISTICS, SavedAdapter, StaticUpdates
from llava_mixlora.method.static_core import METHODS, Moments, low_rank_pair
from playground.answers import CONVERSATION
from playground.studies.sequential_calibration import sequential

BATCH_SIZE = 32
BY_LAYER = (64, 128, 512)
DISTILLED = (128, 512, 2048)
SEQUENTIAL = 512
OF_ONE_TASK = 64
Sample = dict[str, Any]
Group = Callable[["Subject"], dict[str, StaticUpdates]]
"""Makes the updates of some rows of the table, by the row's name."""


@dataclass(frozen=True)
class Subject:
    """A trained adapter and the data that its stand-ins are made from."""

    folder: Path
    base: Path
    data: Path
    images: Path

    @cached_property
    def loaded(self) -> Loaded:
        """Its model, ready to be asked."""
        return load_for_inference(self.folder, self.base)

    @cached_property
    def samples(self) -> list[Sample]:
        """All that it was trained on."""
        return read_conversations(self.data)

    def source(self, samples: int) -> SampleSource:
        """How so many of them are read."""
        return SampleSource(str(self.data), str(self.images), None, samples, CONVERSATION, BATCH_SIZE)

    def drawn(self, count: int, task: str | None = None) -> list[Sample]:
        """So many samples, of all tasks alike or of one."""
        return drawn_evenly([s for s in self.samples if task in (None, s["task"])], count)

    def reading(self, samples: list[Sample]) -> Callable[[str], Iterator[Batch]]:
        """What gives the batches of samples, as often as it is called."""
        return lambda title: batches(samples, self.loaded, self.source(len(samples)), title)


def groups() -> dict[str, Group]:
    """All of them by name, the cheap ones first."""
    found: dict[str, Group] = {"statistics": _statistics}
    found |= {f"{count} samples, by layer": _by_layer(count) for count in BY_LAYER}
    found[f"{SEQUENTIAL} samples, sequential"] = _sequential
    found |= {f"{count} samples, distillation": _distilled(count) for count in DISTILLED}
    return found


def of_one_task(subject: Subject, task: str) -> StaticUpdates:
    """A stand-in for one task alone, by lstsq."""
    made = calibrate(subject.loaded[1], subject.reading(subject.drawn(OF_ONE_TASK, task)), METHODS[:2])
    return made.updates["lstsq"]


def _statistics(subject: Subject) -> dict[str, StaticUpdates]:
    saved = SavedAdapter(subject.folder)
    found = {f"statistics, {method}": saved.static_updates(method) for method in FROM_STATISTICS}
    checkpoints = sorted(subject.folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    if len(checkpoints) > 1:
        before = SavedAdapter(checkpoints[-2])
        found |= {f"statistics of the last steps, {m}": _since(saved, before, m) for m in FROM_STATISTICS}
    return found


def _since(saved: SavedAdapter, before: SavedAdapter, method: str) -> StaticUpdates:
    """The static updates by what has been summed since an earlier checkpoint."""
    found = {}
    for name, layer in saved.items():
        moments = Moments(*(now - then for now, then in zip(layer.moments, before[name].moments)))
        core = FROM_STATISTICS[method](moments, layer.entries)
        found[name] = low_rank_pair(layer.factors_A, layer.factors_B, core)
    return found


def _by_layer(count: int) -> Group:
    def make(subject: Subject) -> dict[str, StaticUpdates]:
        made = calibrate(subject.loaded[1], subject.reading(subject.drawn(count)), METHODS)
        return {f"{count} samples, {method}": updates for method, updates in made.updates.items()}

    return make


def _sequential(subject: Subject) -> dict[str, StaticUpdates]:
    made = sequential(subject.loaded[1], subject.reading(subject.drawn(SEQUENTIAL)))
    return {f"{SEQUENTIAL} samples, sequential": made}


def _distilled(count: int) -> Group:
    def make(subject: Subject) -> dict[str, StaticUpdates]:
        samples, model = subject.drawn(count), subject.loaded[1]
        start = calibrate(model, subject.reading(samples), METHODS[:2]).updates["lstsq"]
        endless = endless_batches(samples, subject.loaded, subject.source(count))
        return {f"{count} samples, distillation": distilled(model, endless, start, BATCH_SIZE, STEPS)}

    return make
