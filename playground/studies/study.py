"""The paper's study in small: do mixed factors reduce interference between tasks, and what does it take?

    python -m playground.studies.study            # goes on where it was interrupted
    python -m playground.studies.study --short    # fewer methods and seeds, no long runs
    python -m playground.studies.study show       # the stored results as the Markdown tables of the README

Adapters of the tiny LLaVA (of its language model; the projector stays as it is) are trained by every method of
`methods`, each on the same data in the same order: on eleven tasks that get along (`eleven_tasks`), and on code books,
which contradict each other (`interference`). How learning rates are chosen is told in `comparison`. Writes
`study.json`, `study.png` (accuracy over trained parameters) and `study_curves.png` (over steps) to
`playground/results`.

All took an hour and forty minutes on two cores of an Intel Xeon, of which long runs took half an hour; the short form
takes some 20 minutes by the same figures. A base model that is not there yet takes some ten minutes more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llava_mixlora import MixLoraError
from playground import PLAYGROUND
from playground.atomic import write_json
from playground.embedded_default import MADE_FROM, prepare_base
from playground.measuring import machine
from playground.notes import Notes
from playground.studies import eleven_tasks, interference
from playground.studies.comparison import Cell, compare

SEEDS, SEEDS_IN_SHORT = (0, 1, 2), (0, 1)


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
    except BrokenProcessPool:
        print("\nerror: a training process was killed (short of memory?); the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    from playground.studies.study_report import draw, draw_curves, tables

    if not results.is_file():
        print(f"error: {results}: no such file; run python -m playground.studies.study first", file=sys.stderr)
        return 1
    contents = json.loads(results.read_text(encoding="utf-8"))
    draw(contents, arguments.results / "study.png")
    draw_curves(contents, arguments.results / "study_curves.png")
    print("\n" + tables(contents))
    return 0


def choose_places(arguments: argparse.Namespace) -> None:
    """Where nothing else is asked for: a trial, or a part of the study, leaves what the whole has made alone."""
    aside = Path("trial" if arguments.trial else "short" if arguments.short else "")
    whole = not (arguments.trial or arguments.short or arguments.only)
    arguments.cache = arguments.cache or PLAYGROUND / "cache" / ("trial" if arguments.trial else "")
    arguments.notes = arguments.notes or PLAYGROUND / "output" / aside / "study_notes.json"
    arguments.results = arguments.results or (
        PLAYGROUND / "results" if whole else PLAYGROUND / "output" / aside / "study"
    )


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet; returns the contents of `study.json`."""
    if arguments.processes < 1:
        raise MixLoraError(f"--processes {arguments.processes}: expected a whole number of at least 1")
    every = cells(arguments.short, arguments.trial)
    wanted = [cell for cell in every if arguments.only in cell.name]
    if not wanted:
        raise MixLoraError(f"--only {arguments.only}: expected a part of names such as {every[0].name!r}")
    base = prepare_base(arguments)
    settings = settings_of(every)
    notes = Notes(arguments.notes, {"settings": settings, "base": (base / MADE_FROM).read_text()})
    seeds = SEEDS_IN_SHORT if arguments.short else SEEDS
    found = compare(wanted, seeds, arguments.cache.absolute(), notes, arguments.processes)
    return {"machine": machine(), "settings": settings, "cells": found}


def settings_of(found: list[Cell]) -> dict[str, Any]:
    """The settings of cells by name, as JSON gives them back, so that they equal those that notes were stored with."""
    return json.loads(json.dumps({cell.setting.name: asdict(cell.setting) for cell in found}))


def cells(short: bool = False, trial: bool = False) -> list[Cell]:
    """Every cell of the study in the order of the tables, or those of its short form; of a trial with a few steps."""
    found = eleven_tasks.cells(short) + interference.cells(short)
    if not trial:
        return found
    return [_tried(cell) for cell in found]


def _tried(cell: Cell) -> Cell:
    setting = cell.setting.tried()
    return replace(cell, setting=setting, steps=cell.steps * setting.steps // cell.setting.steps)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m playground.studies.study", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "what", nargs="?", choices=["run", "show"], default="run", help="show: draw and print what is stored"
    )
    parser.add_argument("--short", action="store_true", help="fewer methods and seeds, no long runs")
    parser.add_argument("--only", default="", help="cells whose name contains this, such as '8 code books' or 'r=16'")
    parser.add_argument("--trial", action="store_true", help="two steps each, to see that everything runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="data and base model (default: playground/cache)")
    parser.add_argument(
        "--results", type=Path, help="folder to write (default: playground/results, in part playground/output/study)"
    )
    parser.add_argument(
        "--notes", type=Path, help="keeps what is measured (default: playground/output/study_notes.json)"
    )
    parser.set_defaults(seed=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
