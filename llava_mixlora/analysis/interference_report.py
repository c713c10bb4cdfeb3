"""What `llava-mixlora interference` has measured: printed, as JSON, and as heatmaps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..lettering import literal
from ..writing import whole_file, write_whole
from .interference_estimate import MEASURABLE, Estimate
from .recommendation import Recommendation

RESULT, PICTURE = "interference.json", "interference.png"
ALL_LAYERS = "all layers"
NOT_MEASURED = (
    f"-: not measurable, since the task's own gain is not {MEASURABLE:.0f} standard errors above zero. Ask for more "
    "--samples, or measure a checkpoint from the middle of training (ADAPTER/checkpoint-N) instead of the end."
)
LETTERS = 12  # of a title in an inch
MOST_NUMBERS = 16  # tasks, up to which the cells of a heatmap have room for their values


@dataclass
class Interference:
    """Estimates by pool (`"A"`, `"B"`): `together` of a step on all layers at once, `by_layer` by layer name.

    `batches` of `batch_size` samples were drawn of each task, with `seed`. `recommendation` is what all of it advises.
    """

    adapter: str
    tasks: list[str]
    batches: int
    batch_size: int
    seed: int
    estimator: str
    together: dict[str, Estimate] = field(default_factory=dict)
    by_layer: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    recommendation: Recommendation | None = None

    def save(self, folder: Path) -> None:
        """Write `interference.json`, and `interference.png` where matplotlib is installed."""
        settings = ("adapter", "tasks", "batches", "batch_size", "seed", "estimator")
        contents: dict[str, Any] = {name: getattr(self, name) for name in settings}
        contents["all_layers"] = {pool: _as_json(found) for pool, found in self.together.items()}
        contents["by_layer"] = {
            pool: {layer: _as_json(found) for layer, found in layers.items()} for pool, layers in self.by_layer.items()
        }
        if self.recommendation:
            contents["recommendation"] = _listed(asdict(self.recommendation))
        write_whole(folder / RESULT, json.dumps(contents) + "\n")
        self._draw(folder / PICTURE)

    def lines(self) -> Iterator[str]:
        """What a command prints: a step on all layers at once, and the recommendation."""
        width = max(map(len, self.tasks))
        for pool, found in self.together.items():
            yield f"{pool} of all layers. Row: the task whose loss changes; column: the task of the step; own step: 1"
            yield " " * (width + 4) + "".join(f"{column:>7}" for column in range(1, len(self.tasks) + 1))
            for number, (task, row) in enumerate(zip(self.tasks, found.interference.tolist()), start=1):
                yield f"{number:>3} {task:<{width}}" + "".join(f"{_shown(value):>7}" for value in row)
            yield from self._summary(found)
            yield ""
        if not all(found.measurable.all() for found in self.together.values()):
            yield NOT_MEASURED
            yield ""
        if self.recommendation:
            yield "Recommendation"
            yield from self.recommendation.lines()

    def _summary(self, found: Estimate) -> Iterator[str]:
        others, errors = found.others()
        measured = f"{int(found.measurable.sum())} of {len(self.tasks)} tasks measurable"
        if len(others) == 0:
            yield measured
            return
        harmful = (others < -2 * errors).double().mean()
        helpful = (others > 2 * errors).double().mean()
        yield (
            f"{measured}; steps on other tasks: mean {others.mean():.2f}, root mean square "
            f"{others.square().mean().sqrt():.2f}; {harmful:.0%} harm and {helpful:.0%} help by two standard errors; "
            f"median standard error {errors.median():.2f}; correlation of two halves of the data "
            f"{_shown(found.halves_correlation)}"
        )

    def _draw(self, file: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print(f"{PICTURE} is left out: matplotlib is not installed; pip install 'llava-mixlora[eval]'")
            return
        rows = [self._panels(pool) for pool in self.together]
        tasks = list(map(literal, self.tasks))
        T, columns = len(tasks), max(map(len, rows))
        size = 1.2 + 0.32 * max(T, 5)
        figure = Figure(figsize=(columns * size + 1.5, len(rows) * size + 1), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
        for axis in axes.flat:
            axis.patch.set(facecolor="0.9", hatch="////", edgecolor="0.75")  # seen where nothing is drawn over it
        for row, panels in zip(axes, rows):
            for axis, (title, found) in zip(row, panels):
                picture = axis.imshow(found.interference, vmin=-1, vmax=1, cmap="RdBu")
                axis.set_title(title, fontsize=8)
                axis.set_xticks(range(T), tasks, rotation=90, fontsize=7)
                axis.set_yticks(range(T), tasks, fontsize=7)
                if T <= MOST_NUMBERS:
                    _write_values(axis, found.interference)
        figure.supxlabel("task of the step", fontsize=9)
        figure.supylabel("task whose loss changes", fontsize=9)
        figure.colorbar(picture, ax=axes, shrink=0.7, extend="both", label="red: harms, blue: helps; own step: 1")
        name = literal(Path(self.adapter).resolve().name)
        figure.suptitle(
            f"Task interference: {name} ({self.estimator}; hatched: not measurable)"
            + (
                f"\n{self.recommendation.headline(int(LETTERS * figure.get_figwidth()))}" if self.recommendation else ""
            ),
            fontsize=10,
        )
        with whole_file(file) as unfinished:
            figure.savefig(unfinished, dpi=130)

    def _panels(self, pool: str) -> list[tuple[str, Estimate]]:
        layers = list(self.by_layer[pool])
        shown = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
        panels = [(ALL_LAYERS, self.together[pool]), *((name, self.by_layer[pool][name]) for name in shown)]
        return [(f"{pool}, {title}", found) for title, found in panels]


def _write_values(axis: Any, values: Tensor) -> None:
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            if math.isfinite(value):
                colour = "white" if abs(value) > 0.65 else "black"
                axis.text(j, i, _shown(value, digits=1), ha="center", va="center", fontsize=5.5, color=colour)


def _shown(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "-"  # + 0.0: no "-0.0"


def _as_json(found: Estimate) -> dict[str, Any]:
    """All fields as lists of numbers with five digits; null for what is not measurable."""
    return {name: _listed(value) for name, value in vars(found).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_listed(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
