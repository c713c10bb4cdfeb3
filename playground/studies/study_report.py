"""The study's results as tables and as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from playground.studies.comparison import HELDOUT, VALIDATION

Contents = dict[str, Any]
"""Of `study.json`, or of one of its cells."""


def tables(contents: Contents) -> str:
    """A Markdown table for each setting, under its name."""
    by_setting = _by(contents["cells"], lambda cell: cell["setting"])
    return "\n\n".join(f"**{name}**\n\n{table(cells)}" for name, cells in by_setting.items())


def table(cells: list[Contents]) -> str:
    """Mean accuracy ± its spread over the seeds, by method, and by steps and kind of question, with what was trained.

    Each method and rank is one row. The kinds are the held-out questions and whatever else was asked, such as those in
    new wordings.
    """
    kinds = dict.fromkeys(kind for cell in cells for kind in cell["asked"] if kind != VALIDATION)
    columns = [(steps, kind) for steps in sorted({cell["steps"] for cell in cells}) for kind in kinds]
    titles = [f"{steps:,} steps" if kind == HELDOUT else f"{steps:,} steps, {kind}" for steps, kind in columns]
    lines = ["| | trained parameters | " + " | ".join(titles) + " |", "| --- |" + " --- |" * (len(columns) + 1)]
    for name, of_row in _by(cells, _name).items():
        by_steps = {cell["steps"]: cell["asked"] for cell in of_row}
        figures = [_figure(by_steps.get(steps, {}).get(kind)) for steps, kind in columns]
        lines.append(f"| {name} | {of_row[0]['trained_parameters']:,} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def draw(contents: Contents, file: Path) -> None:
    """Accuracy over trained parameters, a panel for each setting; lines join a method's ranks, bars are spreads."""
    panels = [
        (setting, steps, of_panel)
        for setting, cells in _by(contents["cells"], lambda cell: cell["setting"]).items()
        for steps, of_panel in sorted(_by(cells, lambda cell: cell["steps"]).items())
    ]
    figure, axes = _axes(len(panels))
    colors = _colors(contents)
    for axis, (setting, steps, cells) in zip(axes, panels):
        for method, of_method in _by(cells, lambda cell: cell["method"]).items():
            held_out = [cell["asked"][HELDOUT] for cell in of_method]
            axis.errorbar(
                [cell["trained_parameters"] for cell in of_method],
                [found["mean"] for found in held_out],
                [found["spread"] for found in held_out],
                label=method,
                capsize=2,
                **colors[method],
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="trained parameters", ylabel="accuracy, %", title=f"{setting}, {steps:,} steps", ylim=(0, 101))
        axis.grid(alpha=0.3)
    _finish(figure, axes, "Held-out accuracy", file)


def draw_curves(contents: Contents, file: Path) -> None:
    """Accuracy on the validation questions over steps in the long runs, a panel for each setting that has some.

    Without long runs there is no picture.
    """
    panels = _by([cell for cell in contents["cells"] if cell.get("curve")], lambda cell: cell["setting"])
    if not panels:
        return
    figure, axes = _axes(len(panels))
    colors = _colors(contents)
    for axis, (setting, cells) in zip(axes, panels.items()):
        for name, of_name in _by(cells, _name).items():
            for cell in of_name:
                steps = [int(step) for step in cell["curve"]]
                label = f"{name}, {cell['steps']:,} steps"
                style = {**colors[cell["method"]], "linestyle": "--" if cell["r"] == 16 else "-"}
                axis.plot(steps, list(cell["curve"].values()), label=label, **style)
        axis.set(xlabel="steps", ylabel="accuracy, %", title=setting, ylim=(0, 101))
        axis.grid(alpha=0.3)
    _finish(figure, axes, "Accuracy on the validation questions in long runs, mean of the seeds", file)


def _axes(count: int) -> tuple[Any, list[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    size = (5 * columns + 3, 3.8 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _finish(figure: Any, axes: list[Any], title: str, file: Path) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _colors(contents: Contents) -> dict[str, dict[str, Any]]:
    """Of every method: circles are MixLoRA, squares and triangles are what it is compared with."""
    palette = plt.get_cmap("tab20").colors
    methods = dict.fromkeys(cell["method"] for cell in contents["cells"])
    styles = {}
    for number, method in enumerate(methods):
        marker = "o" if method.startswith("MixLoRA") else "s" if "LoRA" in method else "^"
        styles[method] = {"color": "black" if method == "LoRA" else palette[number % 20], "marker": marker}
    return styles


def _by(cells: list[Contents], key: Callable[[Contents], Any]) -> dict[Any, list[Contents]]:
    groups: dict[Any, list[Contents]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _name(cell: Contents) -> str:
    return f"{cell['method']}, r={cell['r']}"


def _figure(found: Contents | None) -> str:
    return "" if found is None else f"{found['mean']:.1f} ± {found['spread']:.1f}"
