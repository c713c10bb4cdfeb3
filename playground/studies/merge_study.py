"""What merging costs: static stand-ins for trained adapters, asked the embedded default's 1,500 held-out questions.

    python -m playground.studies.merge_study            # goes on where it was interrupted
    python -m playground.studies.merge_study --only "words, seed 0"
    python -m playground.studies.merge_study show       # the stored results as the Markdown table of the README

Adapters are trained as the main job trains its own, three seeds of each form: `words`, which is the default and has
diagonal cores; `hidden`, the same with routes by hidden states; `paper`, two routers and CFS, whose cores are not
diagonal. What stands in for them:

- `statistics, ...`: from the sums of training, of all steps or of the last 50 (by which two checkpoints differ).
- `N samples, ...`: from N training questions, by each method of `llava-mixlora merge`, and `sequential`: the regression
  of each layer on what the static layers before it make.
- `one task`: from 64 questions of a task by lstsq, asked that task alone; the mean over the tasks.

A question counts as right when greedy decoding would answer it to the letter, checked in one forward pass. Writes
`merge.json`, with every figure of every task, and `merge.png` to `playground/results`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_mixlora import MixLoraError
from llava_mixlora.data.conversations import read_conversations
from llava_mixlora.inputs import positive
from llava_mixlora.merging.distillation import STEPS
from llava_mixlora.merging.judging import judge
from llava_mixlora.merging.static_adapter import StaticUpdates
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.data.main_job import BOOK, HELDOUT, TRAIN, first_of_each_task
from playground.embedded_default import (
    IMAGES,
    MADE_FROM,
    QUESTIONS,
    finetune,
    prepare_base,
    prepare_questions,
    settings_of_mixlora,
)
from playground.embedded_default import parser as main_job_parser
from playground.measuring import machine
from playground.notes import Notes
from playground.studies.stand_ins import Sample, Subject, groups, of_one_task

SEEDS = (0, 1, 2)
FORMS = {
    "words": {},
    "hidden": {"mixlora_router_input": "hidden"},
    "paper": {
        "mixlora_pairing": "rank",
        "mixlora_routing": "ifs_cfs",
        "mixlora_router_scope": "prompt",
        "mixlora_router_input": "hidden",
    },
}
"""By name: what is different from the main job's flags."""
ONE_TASK = "one task"
TEN, BOOKS, ALL = "ten tasks", "five books", "all"
KINDS: dict[str, Callable[[str], bool]] = {
    TEN: lambda task: not task.startswith(BOOK),
    BOOKS: lambda task: task.startswith(BOOK),
    ALL: lambda task: True,
}


def main() -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args()
    results = arguments.results / "merge.json"
    try:
        if arguments.what == "run":
            arguments.results.mkdir(parents=True, exist_ok=True)
            write_json(results, study(arguments))
    except MixLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: training stopped with exit status {error.returncode}; its messages are above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    if not results.is_file():
        print(f"error: {results}: no such file; run python -m playground.studies.merge_study first", file=sys.stderr)
        return 1
    contents = json.loads(results.read_text(encoding="utf-8"))
    draw(contents, arguments.results / "merge.png")
    print("\n" + table(contents))
    return 0


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure what is not noted yet; returns the contents of `merge.json`."""
    names = [f"{form}, seed {seed}" for seed in SEEDS for form in FORMS]
    if not any(arguments.only in f"{name}: {group}" for name in names for group in (*groups(), ONE_TASK)):
        raise MixLoraError(f"--only {arguments.only}: expected a part of a name such as '{names[0]}: {ONE_TASK}'")
    base = prepare_base(arguments)
    prepare_questions(arguments, arguments.cache / QUESTIONS)
    questions = read_conversations(arguments.cache / QUESTIONS / HELDOUT)
    if arguments.questions is not None:
        questions = first_of_each_task(questions, arguments.questions)
    settings = {"questions": len(questions), "distillation_steps": STEPS, "made_from": (base / MADE_FROM).read_text()}
    notes = Notes(arguments.output / "notes.json", settings)
    for seed in SEEDS:
        for form in FORMS:
            _measure(arguments, base, form, seed, questions, notes)
    adapters: dict[str, dict[str, Any]] = {}
    for name, rows in notes.taken.items():
        adapters.setdefault(name.partition(": ")[0], {}).update(rows)
    del settings["made_from"]
    return {"machine": machine(), "settings": settings, "adapters": adapters, "summary": summary(adapters)}


def _measure(
    arguments: argparse.Namespace, base: Path, form: str, seed: int, questions: list[Sample], notes: Notes
) -> None:
    """Train an adapter and measure its stand-ins, as far as they are asked for and not noted."""
    name = f"{form}, seed {seed}"
    tasks = list(dict.fromkeys(question["task"] for question in questions))
    wanted = [group for group in (*groups(), ONE_TASK) if arguments.only in f"{name}: {group}"]
    missing = [group for group in wanted if not notes.has(f"{name}: {group}")]
    if not missing:
        return
    train, images = arguments.cache / QUESTIONS / TRAIN, arguments.cache / "data" / IMAGES
    folder = _trained(arguments, base, form, seed, train, images)
    subject = Subject(folder, base, train, images)
    for group in missing:
        print(f"\n== {name}: {group}", flush=True)
        if group == ONE_TASK:
            of_tasks = [
                _judged(subject, {ONE_TASK: of_one_task(subject, task)}, [q for q in questions if q["task"] == task])
                for task in tasks
            ]
            found = {ONE_TASK: {task: of_task[ONE_TASK][task] for task, of_task in zip(tasks, of_tasks)}}
        else:
            found = _judged(subject, groups()[group](subject), questions)
        notes.add(f"{name}: {group}", found)


def _judged(
    subject: Subject, updates: dict[str, StaticUpdates], questions: list[Sample]
) -> dict[str, dict[str, dict[str, float]]]:
    """By row and task, the accuracy of dynamic and static model in percent, and how far the two are apart."""
    tasks = [question["task"] for question in questions]
    by_task = judge(subject.loaded[1], subject.reading(questions), updates, tasks, by_layer=False)[2]
    return {
        row: {
            task: {
                "dynamic": round(100 * found.right_dynamic, 2),
                "static": round(100 * found.right_static, 2),
                "kl": round(found.kl, 5),
                "same_token": round(100 * found.same_token, 2),
            }
            for task, found in of_row.items()
        }
        for row, of_row in by_task.items()
    }


def _trained(arguments: argparse.Namespace, base: Path, form: str, seed: int, train: Path, images: Path) -> Path:
    """The folder of an adapter, which is trained where it is not there yet."""
    folder = arguments.output / f"llava-v1-{form}-{seed}"
    main_job = main_job_parser().parse_args(["--seed", str(seed)])
    tower = (arguments.cache / "tower").absolute()
    paths = {"model_name_or_path": base.absolute(), "data_path": train, "image_folder": images, "vision_tower": tower}
    finetune(f"MixLoRA, {form}, seed {seed}", {**settings_of_mixlora(main_job), **FORMS[form]}, paths, [], folder)
    return folder


def summary(adapters: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By form, row and kind of task, the mean over the adapters and the spread (standard deviation) of each figure.

    `"lost"` is what an adapter's stand-in loses of the dynamic adapter's accuracy, in points.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for form in FORMS:
        of_form = [rows for name, rows in adapters.items() if name.startswith(f"{form}, ")]
        for row in dict.fromkeys(row for rows in of_form for row in rows):
            measured = [rows[row] for rows in of_form if row in rows]
            found.setdefault(form, {})[row] = {
                kind: _summed([_mean(of_tasks, belongs) for of_tasks in measured]) for kind, belongs in KINDS.items()
            }
    return found


def _mean(of_tasks: dict[str, dict[str, float]], belongs: Callable[[str], bool]) -> dict[str, float]:
    figures = [figures for task, figures in of_tasks.items() if belongs(task)]
    means = {name: statistics.fmean(of_task[name] for of_task in figures) for name in figures[0]}
    return {**means, "lost": means["dynamic"] - means["static"]}


def _summed(of_adapters: list[dict[str, float]]) -> dict[str, Any]:
    told: dict[str, Any] = {"adapters": len(of_adapters)}
    for name in of_adapters[0]:
        values = [figures[name] for figures in of_adapters]
        spread = statistics.stdev(values) if len(values) > 1 else None
        told[name] = {
            "mean": round(statistics.fmean(values), 4),
            "spread": None if spread is None else round(spread, 4),
        }
    return told


def table(contents: dict[str, Any]) -> str:
    """What each stand-in loses, as a Markdown table for each form."""
    return "\n\n".join(_table(form, rows) for form, rows in contents["summary"].items())


def _table(form: str, rows: dict[str, Any]) -> str:
    lines = [
        f"**{form}**",
        "",
        "| | adapters | ten tasks | five books | mean of all | lost | KL (nats) | same next token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = next(iter(rows.values()))
    dynamic = [_figure(first[kind]["dynamic"], 1, "%") for kind in KINDS]
    lines.append(f"| dynamic | {first[ALL]['adapters']} | {' | '.join(dynamic)} | | | |")
    for row, kinds in rows.items():
        static = [_figure(kinds[kind]["static"], 1, "%") for kind in KINDS]
        of_all = kinds[ALL]
        static += [_figure(of_all["lost"], 1), _figure(of_all["kl"], 3), _figure(of_all["same_token"], 1, "%")]
        lines.append(f"| {row} | {of_all['adapters']} | {' | '.join(static)} |")
    return "\n".join(lines)


def _figure(found: dict[str, float | None], digits: int, unit: str = "") -> str:
    spread = "" if found["spread"] is None else f" ± {found['spread']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}{unit}"


def draw(contents: dict[str, Any], file: Path) -> None:
    """Accuracy by stand-in, a panel for each form: the ten tasks and the books; lines are the dynamic adapter's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forms = contents["summary"]
    figure, axes = plt.subplots(1, len(forms), figsize=(6 * len(forms), 6), sharex=True, squeeze=False)
    for axis, (form, rows) in zip(axes[0], forms.items()):
        places = range(len(rows))
        for kind, color, shift in ((TEN, "tab:blue", -0.2), (BOOKS, "tab:orange", 0.2)):
            found = [kinds[kind]["static"] for kinds in rows.values()]
            axis.barh(
                [place + shift for place in places],
                [each["mean"] for each in found],
                xerr=[each["spread"] or 0 for each in found],
                height=0.4,
                color=color,
                label=kind,
            )
            axis.axvline(next(iter(rows.values()))[kind]["dynamic"]["mean"], color=color, linestyle="--")
        axis.set(title=form, xlabel="held-out accuracy (%); dashed: dynamic", xlim=(0, 100))
        axis.set_yticks(places, list(rows), fontsize=8)
        axis.invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m playground.studies.merge_study", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "what", nargs="?", choices=["run", "show"], default="run", help="show: draw and print what is stored"
    )
    parser.add_argument("--only", default="", help=f"what contains this, such as 'words, seed 0: {ONE_TASK}'")
    parser.add_argument("--questions", type=positive, help="at most so many of each task")
    parser.add_argument("--output", type=Path, default=PLAYGROUND / "output" / "merge_study", help="adapters and notes")
    parser.add_argument(
        "--cache", type=Path, default=PLAYGROUND / "cache", help="data and base model (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=PLAYGROUND / "results", help="folder to write")
    parser.set_defaults(seed=0, trial=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
