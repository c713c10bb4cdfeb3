"""Tasks and their factors (`task_loss_weight`): a fixed subset for each task, and the loss that asks routers for it."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from ..errors import MixLoraError

SEED = 0
CANDIDATES = 64  # drawn for each task, of which the one that overlaps least with earlier tasks is kept
LEAST = 1e-30  # a probability below it counts as that much: its logarithm is finite, and so is a scaled gradient


def task_subsets(tasks: int, num_factors: int, r: int) -> Tensor:
    """The factors of each task, int64 [tasks, r] on the CPU: r of `num_factors`, ascending in a row, no two rows alike.

    They come from a fixed seed and are the same everywhere. A row shares as few factors with any row above it as some
    draws can find, and of those found is the one whose factors were used least. It does not depend on the rows below:
    when a task is added at the end, the others keep their factors.

    Raises:
        MixLoraError: there are fewer subsets than tasks.
    """
    if tasks > (possible := math.comb(num_factors, r)):
        raise MixLoraError(
            f"{tasks} tasks: expected at most {possible}, since no two may have the same {r} of num_factors="
            f"{num_factors} factors; raise num_factors, or join tasks under one name"
        )
    return torch.tensor(_drawn(tasks, num_factors, r), dtype=torch.int64, device="cpu").reshape(tasks, r)


def task_loss(score: Tensor, subset: Tensor) -> Tensor:
    """Minus the mean log probability of each instance's factors, averaged over the instances; float32 [...].

    It is least, log r, where the router shares all probability evenly among the r factors.

    Args:
        score: the router's probabilities of all factors, [..., B, E], layers in front. Below 1e-30 they count as
            that, without a gradient.
        subset: the factors of each instance's task, int64 [..., B, r].
    """
    return -score.float().gather(-1, subset).clamp(min=LEAST).log().mean(dim=(-2, -1))


@functools.lru_cache
def _drawn(tasks: int, num_factors: int, r: int) -> tuple[tuple[int, ...], ...]:
    # Of Python's generator only random() is promised to stay the same in all versions.
    draw = random.Random(SEED).random
    every = list(combinations(range(num_factors), r)) if math.comb(num_factors, r) <= CANDIDATES else None
    rows: list[tuple[int, ...]] = []
    masks: list[int] = []  # of the rows: bit e tells whether factor e is in it
    used = [0] * num_factors
    while len(rows) < tasks:
        candidates = every if every is not None else _candidates(draw, used, r)
        ranked = []
        for candidate in candidates:
            mask = sum(1 << factor for factor in candidate)
            largest = max(((mask & other).bit_count() for other in masks), default=0)
            in_all = sum(used[factor] for factor in candidate)
            ranked.append((largest, in_all, draw(), candidate, mask))
        largest, _, _, candidate, mask = min(ranked)
        if largest == r:  # all of them were taken already
            continue
        rows.append(candidate)
        masks.append(mask)
        for factor in candidate:
            used[factor] += 1
    return tuple(rows)


def _candidates(draw: Callable[[], float], used: list[int], r: int) -> list[tuple[int, ...]]:
    """Half of them out of the factors that are used least, half of them out of all."""
    found = []
    for number in range(CANDIDATES):
        order = [(used[factor] if number % 2 else 0, draw(), factor) for factor in range(len(used))]
        found.append(tuple(sorted(factor for *_, factor in sorted(order)[:r])))
    return found
