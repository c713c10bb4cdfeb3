"""The study's results as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def table(contents: dict[str, Any]) -> str:
    """Mean held-out accuracy of the trained tasks ± its spread over the seeds, and zero-shot, by row and rank."""
    ranks = sorted({cell["r"] for cell in contents["cells"]})
    lines = [
        "| | " + " | ".join(f"r={r}" for r in ranks) + " | " + " | ".join(f"zero-shot, r={r}" for r in ranks) + " |"
    ]
    lines.append("| --- |" + " --- |" * (2 * len(ranks)))
    for row, of_row in _rows(contents).items():
        cells = [_figure(of_row.get(r), "mean", "spread") for r in ranks]
        cells += [_figure(of_row.get(r), "zero_shot_mean", "zero_shot_spread") for r in ranks]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(contents: dict[str, Any], file: Path) -> None:
    """Accuracy over rank: trained tasks on the left, the zero-shot task on the right; bars show the seeds' spread."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    panels = (("mean", "spread", "trained tasks"), ("zero_shot_mean", "zero_shot_spread", "zero-shot task"))
    for axis, (mean, spread, title) in zip(axes, panels):
        for number, (row, of_row) in enumerate(_rows(contents).items()):
            shown = {r: cell for r, cell in of_row.items() if mean in cell}
            if not shown:
                continue
            beside = 1 + 0.012 * (number - 5)  # or the bars of one rank would cover each other
            axis.errorbar(
                [r * beside for r in shown],
                [cell[mean] for cell in shown.values()],
                [cell[spread] for cell in shown.values()],
                label=row,
                capsize=2,
                **_style(row),
            )
        axis.set_xscale("log", base=2)
        ranks = sorted({cell["r"] for cell in contents["cells"]})
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.set(xlabel="rank of one input's update, r", ylabel="accuracy, %", title=title)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    seeds = len(contents["cells"][0]["seeds"])
    figure.suptitle(
        f"Held-out accuracy after {contents['settings']['steps']} steps, mean of {seeds} seeds", fontsize=11
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _rows(contents: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in contents["cells"]:
        rows.setdefault(cell["row"], {})[cell["r"]] = cell
    return rows


def _figure(cell: dict[str, Any] | None, mean: str, spread: str) -> str:
    return "" if cell is None or mean not in cell else f"{cell[mean]:.1f} ± {cell[spread]:.1f}"


def _style(row: str) -> dict[str, Any]:
    """Colour: the routing; full line: trained routers; circle: they average the prompt."""
    if not row.startswith("MixLoRA"):
        return {"color": "black" if row == "LoRA" else "gray", "marker": "s", "linestyle": "-"}
    color = "tab:red" if "random" in row else "tab:blue" if "ifs_cfs" in row else "tab:green"
    return {
        "color": color,
        "marker": "^" if "sequence" in row else "o",
        "linestyle": ":" if "frozen" in row or "random" in row else "-",
    }
