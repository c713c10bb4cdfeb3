"""What the main job learns: ten tasks that get along, and five that contradict each other.

The ten are those of `playground.data.tasks` that a tiny model learns in minutes. `presence` and `absence` are left out:
to compare a word of the question with the picture takes it longer, and it stays near chance. The five are code books
(`playground.data.code_books`), which give the same digits different names: an adapter that does not tell them apart
can answer some of one, or of each, but not all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from llava_mixlora.data.conversations import read_conversations
from playground.atomic import atomic_directory, write_json
from playground.data.code_books import WORDINGS, code_books, digit_pictures, questions

HELDOUT, TRAIN = "heldout.json", "train.json"
LEFT_OUT = ("presence", "absence")
BOOKS = 5
BOOK = "book "
"""Begins the name of a task that is a code book; its key word ends it."""
TRAIN_PER_BOOK, HELDOUT_PER_TASK = 800, 100


def build(data: Path, output_dir: Path, seed: int = 0) -> None:
    """Write `train.json` and `heldout.json` into `output_dir`, which appears only when it is complete.

    `data` is a folder that `playground.data.tasks` wrote; the questions are about its pictures, and `heldout.json`, 100
    questions of each task, about those that no training question shows. The same bytes for the same seed.
    """
    with atomic_directory(output_dir, marker=HELDOUT) as folder:
        train = _of_the_ten(read_conversations(data / TRAIN))
        train += _of_the_books(data, "train", TRAIN_PER_BOOK, seed)
        random.Random(f"{seed} main job").shuffle(train)
        write_json(folder / TRAIN, train)
        heldout = first_of_each_task(_of_the_ten(read_conversations(data / HELDOUT)), HELDOUT_PER_TASK)
        heldout += _of_the_books(data, "heldout", HELDOUT_PER_TASK, seed)
        write_json(folder / HELDOUT, heldout)


def first_of_each_task(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` samples of each task, task after task in order of appearance."""
    of_tasks: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        of_tasks.setdefault(sample["task"], []).append(sample)
    return [sample for of_task in of_tasks.values() for sample in of_task[:count]]


def _of_the_ten(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["task"] not in LEFT_OUT]


def _of_the_books(data: Path, split: str, per_book: int, seed: int) -> list[dict[str, Any]]:
    asked = questions(digit_pictures(data, split), code_books(BOOKS), WORDINGS[:1], per_book, seed)
    return [{**sample, "task": BOOK + sample["task"]} for sample in asked]
