"""What a run shows at its end: a table, `results.json` and three pictures."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

from playground.answers import Answers
from playground.data.main_job import BOOK

RIGHT, WRONG = "#1a7f37", "#b42318"


def accuracy_by_task(questions: list[dict[str, Any]], texts: list[str]) -> dict[str, float]:
    """The share of answers that equal the truth to the letter, in percent, by task."""
    right: dict[str, list[bool]] = {}
    for question, text in zip(questions, texts):
        right.setdefault(question["task"], []).append(text == question["truth"])
    return {task: 100 * sum(hits) / len(hits) for task, hits in right.items()}


def results(questions: list[dict[str, Any]], before: list[str], after: list[str], of_lora: list[str]) -> dict[str, Any]:
    """What `results.json` says of answers: accuracies in percent, by task and in the mean.

    `before`: the base model's answers, `after`: those with MixLoRA, `of_lora`: those with the plain LoRA beside it.
    """
    was, now, plain = (accuracy_by_task(questions, texts) for texts in (before, after, of_lora))
    counts = {task: sum(question["task"] == task for question in questions) for task in was}
    tasks = {task: {"before": round(was[task], 2), "after": round(now[task], 2), "n": counts[task]} for task in was}
    return {
        "tasks": tasks,
        "mean_before": _mean(was.values()),
        "mean_after": _mean(now.values()),
        "lora": {"tasks": {task: round(plain[task], 2) for task in plain}, "mean_after": _mean(plain.values())},
    }


def table(contents: dict[str, Any]) -> str:
    """The accuracies as a text table."""
    titles, *rows = _rows(contents)
    width = max(len(row[0]) for row in rows)
    lines = [f"{title:<{width}}" + "".join(f"  {value:>9}" for value in values) for title, *values in (titles, *rows)]
    rule = "-" * len(lines[0])
    tasks = len(contents["tasks"])
    return "\n".join([lines[0], rule, *lines[1 : 1 + tasks], rule, *lines[1 + tasks :]])


def markdown(contents: dict[str, Any]) -> str:
    """The accuracies as a Markdown table, for the model card."""
    titles, *rows = _rows(contents)
    tasks = len(contents["tasks"])
    rows[tasks:] = [[f"**{value}**" for value in row] for row in rows[tasks:]]
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    told = (
        "Held-out accuracy (exact match, greedy) of the embedded default. *LoRA* is a plain LoRA whose rank is the "
        "number of factors, trained on the same data for as many steps."
    )
    return "\n".join([told, "", *lines])


def _rows(contents: dict[str, Any]) -> list[list[str]]:
    """Titles, a row for each task, and means: over the code books, the other tasks and all."""
    tasks, lora = contents["tasks"], contents["lora"]
    columns = {
        "before": {task: row["before"] for task, row in tasks.items()},
        "LoRA": lora["tasks"],
        "MixLoRA": {task: row["after"] for task, row in tasks.items()},
    }
    books = [task for task in tasks if task.startswith(BOOK)]
    others = [task for task in tasks if task not in books]

    def row(title: str, of_tasks: list[str]) -> list[str]:
        means = [sum(column[task] for task in of_tasks) / len(of_tasks) for column in columns.values()]
        return [title, str(sum(tasks[task]["n"] for task in of_tasks)), *(f"{mean:.1f}%" for mean in means)]

    means = {"mean of the code books": books, "mean of the others": others, "mean": list(tasks)}
    return [
        ["task", "questions", *columns],
        *(row(task, [task]) for task in tasks),
        *(row(title, of_tasks) for title, of_tasks in means.items() if of_tasks),
    ]


def _mean(accuracies: Iterable[float]) -> float:
    return round(statistics.mean(accuracies), 2)


def samples(questions: list[dict[str, Any]], texts: list[str], count: int = 6) -> list[tuple[dict[str, Any], str]]:
    """`count` questions of different tasks, each with the model's answer; the same ones every time."""
    numbers = _drawn_of_each_task(questions, 1)
    return [(questions[number], texts[number]) for number in numbers[:: max(1, len(numbers) // count)][:count]]


def draw_contact_sheet(path: Path, questions: list[dict[str, Any]], texts: list[str], image_folder: Path) -> None:
    """Two held-out pictures of every task with question, answer (green: right, red: wrong) and truth."""
    shown = _drawn_of_each_task(questions, 2)
    columns = 6
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, 3.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, number in zip(axes.flat, shown):
        question, text = questions[number], texts[number]
        right = text == question["truth"]
        verdict = text if right else f"{text or '(nothing)'} (truth: {question['truth']})"
        axis.imshow(Image.open(Path(image_folder) / question["image"]))
        axis.set_title(f"{question['task']}: {_wrapped(question['question'])}", fontsize=7)
        axis.text(
            *(0.5, -0.05),
            _wrapped(verdict),
            transform=axis.transAxes,
            fontsize=8,
            color=RIGHT if right else WRONG,
            ha="center",
            va="top",
        )
    figure.suptitle("Held-out pictures: question, the model's answer (green: right, red: wrong), truth")
    _save(figure, path, h_pad=3.0)


def draw_loss_curve(path: Path, mixlora: Path, lora: Path) -> None:
    """The losses by step, from the `trainer_state.json` files that upstream's train() leaves.

    Of a run with held-out data (`--eval_data_path`), the loss on that too, dashed in the same color.
    """
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, trainer_state in (("MixLoRA", mixlora), ("LoRA", lora)):
        history = json.loads(trainer_state.read_text(encoding="utf-8"))["log_history"]
        (trained,) = axis.plot(*_curve(history, "loss"), label=name)
        if (held_out := _curve(history, "eval_loss"))[0]:
            axis.plot(*held_out, "o--", color=trained.get_color(), markersize=3, label=f"{name}, held-out")
    axis.set(xlabel="step", ylabel="loss", title="Fine-tuning of the tiny LLaVA", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    _save(figure, path)


def _curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what a Trainer has logged."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [float(entry[name]) for entry in entries]


def draw_factor_usage(path: Path, answers: Answers) -> None:
    """Which factors each task uses: one heatmap per adapted layer, pool A above pool B, tasks by factors."""
    names = list(answers.usage)
    blocks = sorted(
        {_block(name) for name in names}, key=lambda block: [int(s) for s in block.split(".") if s.isdigit()]
    )
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    figure, axes = plt.subplots(
        2 * len(blocks), len(kinds), figsize=(2.1 * len(kinds) + 1, 3.2 * len(blocks)), squeeze=False, sharey=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for name, usage in answers.usage.items():
        column, row = kinds.index(name.rsplit(".", 1)[-1]), 2 * blocks.index(_block(name))
        for pool, axis in enumerate(axes[row : row + 2, column]):
            share = usage[pool] / usage[pool].sum(dim=1, keepdim=True).clamp(min=1)
            axis.axis("on")
            axis.imshow(share, aspect="auto", vmin=0, cmap="magma")
            axis.set_title(f"{_layer_label(name)}, pool {'AB'[pool]}", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks(range(len(answers.tasks)), answers.tasks, fontsize=5)
    factors = next(iter(answers.usage.values())).shape[-1] if names else 0
    figure.suptitle(
        f"Share of each of the {factors} factors (across) in the routes of each task (down), held-out questions"
    )
    _save(figure, path)


def _drawn_of_each_task(questions: list[dict[str, Any]], count: int) -> list[int]:
    """Indices of `count` questions of every task, task after task, drawn with a fixed seed."""
    of_task: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        of_task.setdefault(question["task"], []).append(number)
    draw = random.Random(0)
    return [number for numbers in of_task.values() for number in draw.sample(numbers, min(count, len(numbers)))]


def _block(name: str) -> str:
    return ".".join(part for part in name.split(".")[:-1] if part not in ("self_attn", "mlp"))


def _layer_label(name: str) -> str:
    number = next((part for part in name.split(".") if part.isdigit()), "")
    return f"layer {number} {name.rsplit('.', 1)[-1]}"


def _wrapped(text: str, width: int = 26) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += ("" if not lines[-1] else " ") + word
    return "\n".join(lines)


def _save(figure: plt.Figure, path: Path, **padding: float) -> None:
    figure.tight_layout(rect=(0, 0, 1, 0.98), **padding)
    figure.savefig(path, dpi=110)
    plt.close(figure)
