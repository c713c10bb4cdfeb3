"""Samples drawn from a data file's tasks alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest

from .conversations import Sample

_NONE_LEFT = object()


def drawn_evenly(samples: Sequence[Sample], count: int, seed: int = 0) -> list[Sample]:
    """At most `count` samples at random, one of each task in turn as long as there are some.

    So every beginning of the result is even too. Samples that name no task are of one task. The same for the same
    seed.
    """
    draw = random.Random(seed)
    by_task: dict[str | None, list[Sample]] = {}
    for sample in samples:
        task = sample.get("task")
        by_task.setdefault(None if task is None else str(task), []).append(sample)
    tasks = [draw.sample(of_task, min(count, len(of_task))) for of_task in by_task.values()]
    draw.shuffle(tasks)
    turns = zip_longest(*tasks, fillvalue=_NONE_LEFT)
    return [sample for turn in turns for sample in turn if sample is not _NONE_LEFT][:count]
