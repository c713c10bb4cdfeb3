"""Whether the instruction's words, or the picture, tell the tasks of a data set apart: what a router could go by.

A router is linear in what it averages, so linear tools show what it can know: the samples' vectors are centred and
scaled as `router_input="words"` does, and each is given to the task of the nearest centroid, itself being left out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKEN = "<image>"
INTERVAL = 2.0
"""In standard errors, to either side: about 95%."""
ROUNDING = 1e-6
"""Smaller differences, relative to the vectors' length, are taken for rounding: equal samples have equal vectors."""


@dataclass(frozen=True)
class Told:
    """How often the nearest centroid is that of a sample's own task.

    Args:
        share: the mean over the tasks, so that a task of many samples does not decide; ties count as their share.
        low: lower end of Wilson's interval of `share`, for `count` independent trials.
        high: its upper end.
        chance: `share` of guessing.
        count: how many samples, or groups of them, were left out in turn.
    """

    share: float
    low: float
    high: float
    chance: float
    count: int


@dataclass(frozen=True)
class Separability:
    """What tells the tasks apart; None for what the data do not show.

    Args:
        words: by the instruction's mean word vector, instructions left out one at a time.
        new_wordings: the same, all instructions of one wording left out at a time; of tasks with several wordings.
        picture: by the mean of the picture's features, all samples of one picture left out at a time.
        likeness: mean cosine of two instructions of one task. 1: the task has one wording; 0: no more alike than any.
        wordings: different instructions of a task, the mean over the tasks.
        shared_wordings: the share of the instructions that are asked in another task too, to the letter.
    """

    words: Told | None
    new_wordings: Told | None
    picture: Told | None
    likeness: float
    wordings: float
    shared_wordings: float


class PictureMeans:
    """The mean of the features that a LLaVA's projector makes of each picture, kept as the model looks at them."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[Tensor] = []
        model.get_base_model().get_model().mm_projector.register_forward_hook(
            lambda module, inputs, features: self._seen.append(features.detach().double().mean(dim=1).cpu())
        )

    def of_first(self, number: int) -> Tensor:
        """Those of the first `number` pictures, float64 [number, d]; what is looked at again comes behind them."""
        return torch.cat(self._seen)[:number]


def separability(
    samples: Mapping[str, Sequence[dict[str, Any]]], tokenizer: Any, embeddings: nn.Module, pictures: Tensor
) -> Separability:
    """Find out what tells tasks apart, without a forward pass.

    Args:
        samples: conversations in LLaVA's format, by task. Each question of a conversation is an instruction.
        tokenizer: the base model's.
        embeddings: the base model's input embeddings.
        pictures: a vector for each sample, task after task, [samples, d]; not read where a sample has no picture.
    """
    asked = [
        (number, text)
        for number, of_task in enumerate(samples.values())
        for sample in of_task
        for text in _instructions(sample)
    ]
    labels, texts = torch.tensor([number for number, _ in asked], dtype=torch.long), [text for _, text in asked]
    words, new_wordings, likeness = None, None, math.nan
    if texts:
        unit = centred(_mean_word_vectors(texts, tokenizer, embeddings))
        words, new_wordings = told_apart(unit, labels, range(len(texts))), told_apart(unit, labels, texts)
        likeness = _likeness(unit, labels)
    tasks_of: dict[str, set[int]] = {}
    for number, text in asked:
        tasks_of.setdefault(text, set()).add(number)
    names = [sample.get("image") for of_task in samples.values() for sample in of_task]
    shown = [position for position, name in enumerate(names) if name is not None]
    task_of_sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s) for s in samples.values()]))
    return Separability(
        words=words,
        new_wordings=new_wordings,
        picture=told_apart(centred(pictures[shown]), task_of_sample[shown], [str(names[n]) for n in shown]),
        likeness=likeness,
        wordings=sum(map(len, tasks_of.values())) / len(samples),
        shared_wordings=sum(len(tasks_of[text]) > 1 for text in texts) / max(1, len(texts)),
    )


def centred(vectors: Tensor) -> Tensor:
    """(v − μ) / rms(v − μ), float64 [N, d], where μ is the mean of all; zero for a vector that is the mean."""
    vectors = vectors.double()
    away = vectors - vectors.mean(dim=0)
    rms = away.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(rms > ROUNDING * vectors.square().mean().sqrt(), away / rms, 0.0)


def told_apart(vectors: Tensor, labels: Tensor, groups: Sequence[Hashable]) -> Told | None:
    """Give each vector to the task of the nearest centroid, its whole group being left out of all centroids.

    Args:
        vectors: those of [`centred`], [N, d].
        labels: index of each one's task, int64 [N].
        groups: what each one belongs to, N of them. A vector whose task lies in its group entirely does not count.

    Returns:
        None when no vector counts.
    """
    T = int(labels.max()) + 1 if len(labels) else 0
    own = torch.nn.functional.one_hot(labels, T).to(vectors)
    sums, counts = own.t() @ vectors, own.sum(dim=0)
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    right, counted, trials = (
        torch.zeros_like(labels, dtype=torch.float64),
        torch.zeros_like(labels, dtype=torch.bool),
        0,
    )
    for group in members.values():
        left = counts - own[group].sum(dim=0)
        if int((left > 0).sum()) < 2:
            continue
        centroids = (sums - own[group].t() @ vectors[group]) / left.clamp(min=1).unsqueeze(1)
        # |v|² is the same for all centroids; with it, distances of near vectors would be lost in rounding.
        distance = centroids.square().mean(dim=1) - 2 * vectors[group] @ centroids.t() / vectors.shape[1]
        distance = distance.masked_fill(left == 0, torch.inf)
        nearest = (distance <= distance.min(dim=1, keepdim=True).values + ROUNDING).to(vectors)
        right[group] = (nearest * own[group]).sum(dim=1) / nearest.sum(dim=1)
        counted[group] = left[labels[group]] > 0
        trials += bool(counted[group].any())
    if not trials:
        return None
    shares = [right[counted & (labels == task)].mean() for task in labels[counted].unique()]
    share = float(torch.stack(shares).mean())
    return Told(share, *_wilson(share, trials), chance=1 / T, count=trials)


def _instructions(sample: dict[str, Any]) -> list[str]:
    questions = [turn["value"] for turn in sample["conversations"] if turn["from"] == "human"]
    return [text for text in (question.replace(IMAGE_TOKEN, "").strip() for question in questions) if text]


def _mean_word_vectors(texts: Sequence[str], tokenizer: Any, embeddings: nn.Module) -> Tensor:
    """The mean input embedding of each text's tokens, float64 [texts, d] on the CPU."""
    device = next(embeddings.parameters()).device
    means = {}
    with torch.no_grad():
        for text in dict.fromkeys(texts):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            means[text] = embeddings(torch.tensor(ids, device=device)).double().mean(dim=0).cpu()
    return torch.stack([means[text] for text in texts])


def _likeness(unit: Tensor, labels: Tensor) -> float:
    """The mean over the tasks of the mean cosine of two of a task's vectors; NaN when no task has two."""
    found = []
    for task in labels.unique():
        mine = unit[labels == task]
        n, d = mine.shape
        if n > 1:
            # The squared length of the sum holds all pairs, and each vector with itself.
            found.append((mine.sum(dim=0).square().sum() - mine.square().sum()) / (n * (n - 1) * d))
    return float(torch.stack(found).mean()) if found else math.nan


def _wilson(share: float, count: int) -> tuple[float, float]:
    squared = INTERVAL**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    reach = INTERVAL * math.sqrt(share * (1 - share) / count + squared / (4 * count**2)) / (1 + squared / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)
