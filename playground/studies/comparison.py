"""Methods beside each other on one setting of tasks: cells, their learning rates, and runs in several processes.

A cell is a method in a setting, trained for some steps; a run is one training of it. Learning rates are doubled or
halved until both neighbours of the best one are worse, by the validation questions, with the first seed and the
setting's own number of steps; longer runs take the rate that was found so, and a setting may take those of another.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from playground.embedded_default import IMAGES
from playground.notes import Notes
from playground.studies.methods import METHODS, ONE_PER_TASK, Course, Learner
from playground.studies.short_training import Items, Sample, TinyLlava, accuracy, drawn

RATES = tuple(1e-3 * 2.0**power for power in range(-3, 5))
FIRST_RATE = 1e-3
TRAIN, VALIDATION, HELDOUT = "train", "validation", "held out"
CURVE = (75, 150, 300, 600, 900, 1200, 1500, 2000, 2500, 3000)  # steps of a long run after which it is asked
RATE_OF = {"Arrow, r=4": ONE_PER_TASK.name}  # it trains what this one trains


@dataclass(frozen=True)
class Setting(ABC):
    """Tasks to learn together.

    Args:
        name: as tables name it.
        steps: of a run that learning rates are chosen by.
        batch_size: samples of a step.
        validation_questions: of each task, to choose learning rates by.
        questions: of each task, held out.
        layers: indices of the decoder layers to adapt; all when None.
        tuned_in: the setting whose learning rates this one takes; its own when None.
    """

    name: str
    steps: int
    batch_size: int
    validation_questions: int
    questions: int
    layers: tuple[int, ...] | None = None
    tuned_in: Setting | None = None

    @abstractmethod
    def samples(self, data: Path) -> dict[str, list[Sample]]:
        """What to train on (`TRAIN`), and what to ask: `VALIDATION`, `HELDOUT`, and further questions by their name.

        `data` is a folder that `playground.data.tasks` wrote.
        """

    def tried(self) -> Setting:
        """The same with two steps and few questions, to see that everything runs."""
        tuned_in = None if self.tuned_in is None else self.tuned_in.tried()
        return replace(self, steps=2, validation_questions=1, questions=1, tuned_in=tuned_in)


@dataclass(frozen=True)
class Cell:
    """A method of `METHODS` in a setting, trained for some steps."""

    setting: Setting
    method: str
    steps: int

    @property
    def name(self) -> str:
        """Setting, method and steps."""
        return f"{self.setting.name}: {self.method}, {self.steps} steps"

    @property
    def tuned_as(self) -> Cell:
        """The cell whose learning rate this one takes; often itself."""
        setting = self.setting.tuned_in or self.setting
        return Cell(setting, RATE_OF.get(self.method, self.method), setting.steps)


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


def compare(cells: Sequence[Cell], seeds: Sequence[int], cache: Path, notes: Notes, processes: int) -> list[Any]:
    """Train what the notes lack, first what tells the learning rates; returns the contents of each cell for JSON.

    Args:
        cells: what to compare.
        seeds: of the runs of each cell; the first chooses the learning rates.
        cache: holds the folders `data` and `llava-v1-tiny`.
        notes: are added to after each run.
        processes: how many train at the same time, with one thread each.
    """
    tuned = list(dict.fromkeys(cell.tuned_as for cell in cells))
    with _pool(processes) as pool:
        for attempt in itertools.count(1):
            tries = [Run(cell, rate, seeds[0]) for cell in tuned for rate in rates_to_try(cell, notes.taken, seeds[0])]
            if not tries:
                break
            _measure(pool, cache, tries, notes, f"Learning rates, round {attempt}")
        rates = {cell: best_rate(cell.tuned_as, notes.taken, seeds[0]) for cell in cells}
        _measure(pool, cache, [Run(cell, rates[cell], seed) for seed in seeds for cell in cells], notes, "Study")
    return [contents(cell, rates[cell], seeds, notes.taken) for cell in cells]


def validation_by_rate(cell: Cell, taken: dict[str, Any], seed: int) -> dict[float, float]:
    """Mean accuracy on the validation questions by the learning rates that were tried with this seed."""
    names = {rate: Run(cell, rate, seed).name for rate in RATES}
    return {rate: _mean(taken[name]["asked"][VALIDATION]) for rate, name in names.items() if name in taken}


def best_rate(cell: Cell, taken: dict[str, Any], seed: int) -> float:
    """The learning rate that did best; of equal ones the lowest."""
    tried = validation_by_rate(cell, taken, seed)
    return max(tried, key=lambda rate: (tried[rate], -rate))


def rates_to_try(cell: Cell, taken: dict[str, Any], seed: int) -> list[float]:
    """Half and twice the best learning rate so far, unless they were tried; none when the best one is found."""
    tried = validation_by_rate(cell, taken, seed)
    if not tried:
        return [FIRST_RATE]
    best = RATES.index(best_rate(cell, taken, seed))
    return [rate for rate in RATES[max(0, best - 1) : best + 2] if rate not in tried]


def train_and_ask(cache: Path, run: Run) -> dict[str, Any]:
    """One training, and its accuracies in percent: `asked` by part and task; in a long run a `curve` by step too.

    The curve is the mean accuracy on the validation questions. `seconds` are those that the processor took to train.
    """
    setting, method = run.cell.setting, METHODS[run.cell.method]
    llava, data = _base(cache), _data(cache, setting)
    items = data[TRAIN]
    curve: dict[str, float] = {}

    def watch(learner: Learner, step: int) -> None:
        if step in CURVE:
            curve[str(step)] = _mean(accuracy(learner.model, data[VALIDATION], learner.inputs))

    steps = list(drawn(len(items.samples), run.cell.steps, setting.batch_size, run.seed))
    is_long = run.cell.steps > setting.steps
    start = time.process_time()
    learnt = method.learn(Course(llava, items, steps, run.rate, run.seed, setting.layers, watch if is_long else None))
    seconds = time.process_time() - start
    learner = learnt.learner
    asked = {
        part: accuracy(learner.model, of_part, learner.inputs)
        for part, of_part in data.items()
        if part != TRAIN and not (method.asks_with_tasks and _has_further_tasks(of_part))
    }
    found = {"asked": asked, "trained_parameters": learnt.trained_parameters, "seconds": _rounded(seconds)}
    return found | ({"curve": curve} if is_long else {})


def contents(cell: Cell, rate: float, seeds: Sequence[int], taken: dict[str, Any]) -> dict[str, Any]:
    """What `study.json` says of a cell: its rate and how that was found, its seeds, and means and spreads over them."""
    method, by_seed = METHODS[cell.method], {seed: taken[Run(cell, rate, seed).name] for seed in seeds}
    runs = list(by_seed.values())
    tried = validation_by_rate(cell.tuned_as, taken, seeds[0])
    found = {
        "setting": cell.setting.name,
        "method": method.row,
        "r": method.r,
        "steps": cell.steps,
        "learning_rate": rate,
        "tuned_as": cell.tuned_as.name,
        "validation_by_rate": {f"{one:g}": mean for one, mean in tried.items()},
        "trained_parameters": runs[0]["trained_parameters"],
        "asked": {part: _summary([run["asked"][part] for run in runs]) for part in runs[0]["asked"]},
        "seeds": {str(seed): run for seed, run in by_seed.items()},
    }
    if "curve" in runs[0]:
        steps = runs[0]["curve"]
        found["curve"] = {step: _rounded(statistics.mean(run["curve"][step] for run in runs)) for step in steps}
    return found


def _summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean over tasks and seeds, and the standard deviation over seeds, 0 of one."""
    means = [_mean(run) for run in runs]
    return {
        "mean": _rounded(statistics.mean(means)),
        "spread": _rounded(statistics.stdev(means)) if len(means) > 1 else 0.0,
        "by_task": {task: _rounded(statistics.mean(run[task] for run in runs)) for task in runs[0]},
    }


def _mean(by_task: dict[str, float]) -> float:
    return _rounded(sum(by_task.values()) / len(by_task))


_rounded = partial(round, ndigits=2)


def _has_further_tasks(items: Items) -> bool:
    return any(sample["task"] not in items.tasks for sample in items.samples)


def _measure(pool: ProcessPoolExecutor, cache: Path, runs: Iterable[Run], notes: Notes, title: str) -> None:
    missing = [run for run in runs if not notes.has(run.name)]
    futures = {pool.submit(train_and_ask, cache, run): run for run in missing}
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
def _base(cache: Path) -> TinyLlava:
    """Once in each process."""
    return TinyLlava(cache / "llava-v1-tiny", cache / "data" / IMAGES)


@functools.cache
def _data(cache: Path, setting: Setting) -> dict[str, Items]:
    """Once in each process; all parts number the tasks as the part to train on does."""
    samples = setting.samples(cache / "data")
    tasks = tuple(dict.fromkeys(sample["task"] for sample in samples[TRAIN]))
    return {part: Items(_base(cache), of_part, tasks) for part, of_part in samples.items()}
