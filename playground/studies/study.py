"""The paper's study in small: do mixed factors reduce interference between tasks, and do trained routers help?

    python -m playground.studies.study            # about an hour on two cores; goes on where it was interrupted
    python -m playground.studies.study show       # the stored results as the Markdown table of the README

Adapters of the tiny LLaVA (of its language model; the projector stays as it is) are trained on eleven tasks at once,
each on the same data in the same order for as many steps. The twelfth task is not trained: it is the zero-shot test. As
the bound without interference, a LoRA for each task takes the same steps on that task's part of every batch. Learning
rates are doubled or halved until both neighbours of the best one are worse, on questions about pictures that are
neither trained on nor tested. Writes `playground/results/study.json` and `study.png`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig
from tqdm import tqdm

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.inputs import read_conversations
from llava_mixlora.method.model import LLAMA_LINEAR_LAYERS
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.embedded_default import HELDOUT, IMAGES, MADE_FROM, TRAIN, prepare_base
from playground.measuring import machine
from playground.notes import Notes
from playground.studies.short_training import Items, TinyLlava, accuracy, drawn, train

FACTORS = 16
LORA_RANKS, RANKS = (2, 4, 8, 16), (2, 4, 8)
RATES = tuple(2e-3 * 2.0**power for power in range(-3, 4))  # looked through from the middle
SEEDS = (0, 1, 2)
ZERO_SHOT = "digit"
VALIDATION_SHARE = 10  # one training picture in so many is asked about for the learning rates only
SINGLE = "one LoRA per task"
TRIAL = {"steps": 2, "validation_questions": 1, "questions": 1}

Data = dict[str, Items]


@dataclass(frozen=True)
class Cell:
    """One method of the study with one rank; the last three only for MixLoRA."""

    method: str  # "LoRA", "MixLoRA" or SINGLE
    r: int
    routing: str = ""
    router_gradient: str = ""
    router_scope: str = ""

    @property
    def row(self) -> str:
        """The name without the rank: a row of the table."""
        if self.method != "MixLoRA":
            return self.method
        if self.routing == "random":
            return "MixLoRA random"
        routers = {"straight_through": "trained", "none": "frozen"}[self.router_gradient]
        return f"MixLoRA {self.routing}, {routers}, {self.router_scope}"

    @property
    def name(self) -> str:
        """Row and rank."""
        return f"{self.row}, r={self.r}"

    @property
    def tuned_as(self) -> Cell:
        """The cell whose learning rate this one takes; the two scopes of a router share one."""
        return Cell(self.method, self.r, self.routing, self.router_gradient, "prompt" if self.router_scope else "")

    def config(self) -> PeftConfig:
        """The adapter's configuration; `lora_alpha` is twice the number of factors, the authors' ratio."""
        if self.method != "MixLoRA":
            return LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=LLAMA_LINEAR_LAYERS)
        given = {name: value for name, value in asdict(self).items() if name.startswith("rout") and value}
        return MixLoraConfig(
            r=self.r, num_factors=FACTORS, lora_alpha=2 * FACTORS, target_modules=LLAMA_LINEAR_LAYERS, **given
        )


def cells() -> list[Cell]:
    """Every cell of the study, in the order of the table."""
    found = [Cell(SINGLE, max(LORA_RANKS)), *(Cell("LoRA", r) for r in LORA_RANKS)]
    for routing in ("ifs", "ifs_cfs"):
        for gradient in ("straight_through", "none"):
            for scope in ("prompt", "sequence"):
                found += [Cell("MixLoRA", r, routing, gradient, scope) for r in RANKS]
    return found + [Cell("MixLoRA", r, "random") for r in RANKS]


@dataclass(frozen=True)
class Run:
    """One training: its cell, its learning rate, and the seed of its initial weights and of the order of the data."""

    cell: Cell
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """What its result is kept under."""
        return f"{self.cell.name}, lr={self.rate:g}, seed={self.seed}"


@dataclass(frozen=True)
class Plan:
    """What all runs of a study have in common."""

    cache: str
    zero_shot: str = ZERO_SHOT
    steps: int = 240
    batch_size: int = 8
    validation_questions: int = 30  # of each task
    questions: int = 100  # of each task, held out


def main() -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args()
    choose_places(arguments)
    results = arguments.results / "study.json"
    try:
        if arguments.what == "run":
            arguments.results.mkdir(parents=True, exist_ok=True)
            write_json(results, study(arguments))
    except MixLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    from playground.studies.study_report import draw, table

    if not results.is_file():
        print(f"error: {results}: no such file; run python -m playground.studies.study first", file=sys.stderr)
        return 1
    contents = json.loads(results.read_text(encoding="utf-8"))
    draw(contents, arguments.results / "study.png")
    print("\n" + table(contents))
    return 0


def choose_places(arguments: argparse.Namespace) -> None:
    """Where nothing else is asked for: a trial, or a part of the study, leaves what the whole has made alone."""
    aside = Path("trial" if arguments.trial else "")
    whole = not arguments.trial and not arguments.only
    arguments.cache = arguments.cache or PLAYGROUND / "cache" / aside
    arguments.notes = arguments.notes or PLAYGROUND / "output" / aside / "study_notes.json"
    arguments.results = arguments.results or (
        PLAYGROUND / "results" if whole else PLAYGROUND / "output" / aside / "study"
    )


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet; returns the contents of `study.json`."""
    if arguments.processes < 1:
        raise MixLoraError(f"--processes {arguments.processes}: expected a whole number of at least 1")
    wanted = [cell for cell in cells() if arguments.only in cell.name]
    if not wanted:
        raise MixLoraError(f"--only {arguments.only}: expected a part of names such as {cells()[1].name!r}")
    base = prepare_base(arguments)
    plan = Plan(str(arguments.cache.absolute()), **(TRIAL if arguments.trial else {}))
    settings = {name: value for name, value in asdict(plan).items() if name != "cache"}
    notes = Notes(arguments.notes, {**settings, "base": (base / MADE_FROM).read_text()})
    tuned = list(dict.fromkeys(cell.tuned_as for cell in wanted))
    with _pool(arguments.processes) as pool:
        for attempt in itertools.count(1):
            tries = [Run(cell, rate, SEEDS[0]) for cell in tuned for rate in rates_to_try(cell, notes.taken)]
            if not tries:
                break
            _measure(pool, plan, tries, notes, f"Learning rates, round {attempt}")
        runs = [Run(cell, best_rate(cell.tuned_as, notes.taken), seed) for seed in SEEDS for cell in wanted]
        _measure(pool, plan, runs, notes, "Study")
    return {
        "machine": machine(),
        "settings": settings,
        "cells": [_contents(cell, notes.taken) for cell in wanted],
    }


def validation_by_rate(cell: Cell, taken: dict[str, Any]) -> dict[float, float]:
    """Mean accuracy on the validation questions by the learning rates that were tried, with the first seed."""
    names = {rate: Run(cell, rate, SEEDS[0]).name for rate in RATES}
    return {rate: _mean(taken[name]["validation"]) for rate, name in names.items() if name in taken}


def best_rate(cell: Cell, taken: dict[str, Any]) -> float:
    """The learning rate that did best; of equal ones the lowest."""
    tried = validation_by_rate(cell, taken)
    return max(tried, key=lambda rate: (tried[rate], -rate))


def rates_to_try(cell: Cell, taken: dict[str, Any]) -> list[float]:
    """Half and twice the best learning rate so far, unless they were tried; none when the best one is found."""
    tried = validation_by_rate(cell, taken)
    if not tried:
        return [RATES[len(RATES) // 2]]
    best = RATES.index(best_rate(cell, taken))
    return [rate for rate in RATES[max(0, best - 1) : best + 2] if rate not in tried]


def train_and_ask(plan: Plan, run: Run) -> dict[str, Any]:
    """One training and its accuracies in percent by task: `validation`, `heldout`, and `zero_shot`, one number."""
    llava, data = _data(plan)
    learnt_from = data["train"]
    steps = list(drawn(len(learnt_from.samples), plan.steps, plan.batch_size, run.seed))
    if run.cell.method == SINGLE:
        return _train_and_ask_each(llava, data, run, steps)
    model = llava.adapted(run.cell.config(), run.seed)
    train(model, learnt_from, steps, run.rate)
    (zero_shot,) = accuracy(model, data["zero_shot"]).values()
    return {
        "validation": accuracy(model, data["validation"]),
        "heldout": accuracy(model, data["heldout"]),
        "zero_shot": zero_shot,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _train_and_ask_each(llava: TinyLlava, data: Data, run: Run, steps: list[list[int]]) -> dict[str, Any]:
    found: dict[str, Any] = {"validation": {}, "heldout": {}}
    for task in dict.fromkeys(sample["task"] for sample in data["heldout"].samples):
        model = llava.adapted(run.cell.config(), run.seed)
        samples = data["train"].samples
        train(model, data["train"], [[n for n in step if samples[n]["task"] == task] for step in steps], run.rate)
        for part, accuracies in found.items():
            of_task = [sample for sample in data[part].samples if sample["task"] == task]
            accuracies |= accuracy(model, Items(llava, of_task))
    return found


def _contents(cell: Cell, taken: dict[str, Any]) -> dict[str, Any]:
    rate = best_rate(cell.tuned_as, taken)
    by_seed = {seed: taken[Run(cell, rate, seed).name] for seed in SEEDS}
    runs = list(by_seed.values())
    means = [_mean(run["heldout"]) for run in runs]
    contents = {
        "row": cell.row,
        **asdict(cell),
        "learning_rate": rate,
        "validation_by_rate": {f"{tried:g}": mean for tried, mean in validation_by_rate(cell.tuned_as, taken).items()},
        "mean": _rounded(statistics.mean(means)),
        "spread": _rounded(statistics.stdev(means)),
        "by_task": {
            task: _rounded(statistics.mean(run["heldout"][task] for run in runs)) for task in runs[0]["heldout"]
        },
        "seeds": {str(seed): run for seed, run in by_seed.items()},
    }
    if cell.method != SINGLE:
        unseen = [run["zero_shot"] for run in runs]
        contents |= {
            "trained_parameters": runs[0]["trained_parameters"],
            "zero_shot_mean": _rounded(statistics.mean(unseen)),
            "zero_shot_spread": _rounded(statistics.stdev(unseen)),
        }
    return contents


def _mean(by_task: dict[str, float]) -> float:
    return _rounded(sum(by_task.values()) / len(by_task))


_rounded = partial(round, ndigits=2)


def _measure(pool: ProcessPoolExecutor, plan: Plan, runs: Iterable[Run], notes: Notes, title: str) -> None:
    missing = [run for run in runs if not notes.has(run.name)]
    futures = {pool.submit(train_and_ask, plan, run): run for run in missing}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=title, unit="run"):
            notes.add(futures[future].name, future.result())
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _be_quiet_and_single)


def _be_quiet_and_single() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted study ends at once, without a traceback from each
    torch.set_num_threads(1)  # on tiny models, two threads of one run help less than two runs
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@functools.cache
def _data(plan: Plan) -> tuple[TinyLlava, Data]:
    """Once in each process: the base, and the samples to train on, to choose learning rates by, and to test on."""
    data = Path(plan.cache) / "data"
    samples = read_conversations(data / TRAIN)
    known = [sample for sample in samples if sample["task"] != plan.zero_shot]
    set_aside = set(sorted({sample["image"] for sample in known})[::VALIDATION_SHARE])
    unseen = [sample for sample in known if sample["image"] in set_aside]
    test = _of_each_task(read_conversations(data / HELDOUT), plan.questions)
    parts = {
        "train": [sample for sample in known if sample["image"] not in set_aside],
        "validation": _of_each_task(unseen, plan.validation_questions),
        "heldout": [sample for sample in test if sample["task"] != plan.zero_shot],
        "zero_shot": [sample for sample in test if sample["task"] == plan.zero_shot],
    }
    llava = TinyLlava(Path(plan.cache) / "llava-v1-tiny", data / IMAGES)
    return llava, {name: Items(llava, of_part) for name, of_part in parts.items()}


def _of_each_task(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["task"], []).append(sample)
    return [sample for of_task in found.values() for sample in of_task[:count]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m playground.studies.study", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "what", nargs="?", choices=["run", "show"], default="run", help="show: draw and print what is stored"
    )
    parser.add_argument("--cache", type=Path, help="data and base model (default: playground/cache)")
    parser.add_argument(
        "--results", type=Path, help="folder to write (default: playground/results, in part playground/output/study)"
    )
    parser.add_argument(
        "--notes",
        type=Path,
        help="keeps what is measured (default: playground/output/study_notes.json)",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread (default: %(default)s)")
    parser.add_argument("--only", default="", help="cells whose name contains this, such as 'LoRA, r=4'")
    parser.add_argument("--trial", action="store_true", help="two steps each, to see that everything runs")
    parser.set_defaults(seed=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
