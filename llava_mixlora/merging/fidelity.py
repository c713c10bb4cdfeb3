"""How far a static model is from the dynamic one it stands for: printed, as JSON, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..lettering import literal
from ..method.layer_merging import LOSSY
from ..method.tensor_names import by_number

REPORT, PICTURE = "merge_report.json", "merge_report.png"
LARGEST_KL, LEAST_SAME = 0.05, 0.85
"""Next tokens of a static model that diverge more (nats) from the dynamic one's, or are less often the same, are not
written without `--force`. On the playground's tasks an accuracy of 90% loses some 4 points at 0.05 nats."""
INSTEAD = (
    "merge for one task with --task NAME, keep the adapter dynamic (`llava-mixlora run` trains, chats and serves with "
    "it), or add --force"
)
ErrorsByLayer = dict[str, dict[str, float]]
"""By layer name and method: ‖Δy − static Δy‖ / ‖Δy‖ over all positions of a set of data, 0 being exact."""


@dataclass(frozen=True)
class Agreement:
    """Two models' predictions of the supervised tokens of held-out data, given all tokens before.

    `kl`: mean KL divergence of the static model's next-token distribution from the dynamic one's, in nats;
    `same_token`: share of positions with the same likeliest token; `loss_dynamic`, `loss_static`: mean cross entropy.
    Of whole samples: `same_answer`, the share in which every token's likeliest is the same; `right_dynamic`,
    `right_static`, the shares that greedy decoding would answer as the data do, to the letter.
    """

    kl: float
    same_token: float
    loss_dynamic: float
    loss_static: float
    same_answer: float
    right_dynamic: float
    right_static: float
    tokens: int
    samples: int


@dataclass
class Fidelity:
    """What was measured; parts that were not are empty.

    `training`: errors over the training data, from the saved statistics; `calibration`: over the data that the static
    updates were made from; `heldout`: over data that they were not made from; `agreement`: by method, on the same;
    `by_task`: by method and task, where samples name theirs.
    """

    adapter: str
    base: str
    method: str
    task: str | None = None
    samples: dict[str, int] = field(default_factory=dict)
    training: ErrorsByLayer = field(default_factory=dict)
    calibration: ErrorsByLayer = field(default_factory=dict)
    heldout: ErrorsByLayer = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    by_task: dict[str, dict[str, Agreement]] = field(default_factory=dict)

    def problem(self) -> str | None:
        """Why the stand-in is too far off to be written without being asked twice; None of a good one."""
        if self.agreement:
            found = self.agreement[self.method]
            if found.kl <= LARGEST_KL and found.same_token >= LEAST_SAME:
                return None
            return (
                f"merging {self.adapter} by {self.method} loses too much: on {found.samples} held-out samples the next "
                f"token diverges by {found.kl:.3f} nats (limit {LARGEST_KL}) and is the same at {found.same_token:.1%} "
                f"(limit {LEAST_SAME:.0%}), {found.right_static:.1%} of the answers are right in the place of "
                f"{found.right_dynamic:.1%}; {INSTEAD}"
            )
        error = self.mean_error(self.training)
        if error is None or error <= LOSSY:
            return None
        return (
            f"{self.adapter}: what merging costs its answers was not measured, and over the training data the static "
            f"update by {self.method} misses {error:.0%} of the dynamic one, above {LOSSY:.0%}; measure and mend it "
            f"with --calibration DATA --image-folder DIR, or {INSTEAD}"
        )

    def mean_error(self, errors: ErrorsByLayer) -> float | None:
        """The mean over the layers of the errors by the method; None where there are none."""
        return sum(row[self.method] for row in errors.values()) / len(errors) if errors else None

    def save(self, folder: Path) -> None:
        """Write `merge_report.json`, and `merge_report.png` where matplotlib is installed."""
        (folder / REPORT).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        self._draw(folder / PICTURE)

    def lines(self) -> Iterator[str]:
        """What a command prints."""
        yield f"static stand-in for {self.adapter} by {self.method}" + (f", task {self.task}" if self.task else "")
        for title, errors in self._measured().items():
            methods = list(next(iter(errors.values())))
            width = max(map(len, [*errors, title]))
            yield ""
            yield f"{title:<{width}}  " + "  ".join(f"{method:>10}" for method in methods)
            for layer, row in errors.items():
                yield f"{layer:<{width}}  " + "  ".join(f"{row[method]:>10.4f}" for method in methods)
            means = (sum(row[method] for row in errors.values()) / len(errors) for method in methods)
            yield f"{'mean over the layers':<{width}}  " + "  ".join(f"{mean:>10.4f}" for mean in means)
        if self.agreement:
            yield ""
            yield f"{'held-out tokens':<16}{'KL (nats)':>12}{'same token':>12}{'loss dynamic':>14}{'loss static':>13}"
            for method, found in self.agreement.items():
                yield (
                    f"{method:<16}{found.kl:>12.4f}{found.same_token:>12.1%}{found.loss_dynamic:>14.4f}"
                    f"{found.loss_static:>13.4f}"
                )
            yield from self._answer_lines()
        elif self.training:
            yield ""
            yield "How the model's answers change was not measured: that takes --calibration DATA."

    def _answer_lines(self) -> Iterator[str]:
        of_all = self.agreement[self.method]
        rows = {f"all, by {self.method}": of_all, **dict(sorted(self.by_task.get(self.method, {}).items()))}
        width = max(map(len, [*rows, "held-out answers"]))
        yield ""
        yield f"{'held-out answers':<{width}}{'number':>8}{'same':>9}{'right dynamic':>15}{'right static':>14}"
        for name, found in rows.items():
            yield (
                f"{name:<{width}}{found.samples:>8}{found.same_answer:>9.1%}{found.right_dynamic:>15.1%}"
                f"{found.right_static:>14.1%}"
            )

    def _measured(self) -> dict[str, ErrorsByLayer]:
        titles = {
            "relative error, training": self.training,
            "relative error, calibration": self.calibration,
            "relative error, held out": self.heldout,
        }
        return {
            title: {layer: errors[layer] for layer in sorted(errors, key=by_number)}
            for title, errors in titles.items()
            if errors
        }

    def _draw(self, file: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print(f"{PICTURE} is left out: matplotlib is not installed; pip install 'llava-mixlora[eval]'")
            return
        measured = self._measured()
        figure = Figure(figsize=(11, 3.2 * max(1, len(measured)) + 1.5), layout="constrained")
        axes = figure.subplots(max(1, len(measured)), 1, sharex=True, squeeze=False)
        for axis, (title, errors) in zip(axes[:, 0], measured.items()):
            for method in next(iter(errors.values())):
                axis.plot(range(len(errors)), [row[method] for row in errors.values()], marker="o", label=method)
            axis.set(title=title, ylabel="‖error‖ / ‖update‖", ylim=(0, None))
            axis.set_xticks(range(len(errors)), list(errors), rotation=90, fontsize=6)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"Static stand-in for {literal(Path(self.adapter).resolve().name)}, by {self.method}")
        figure.savefig(file, dpi=110)
