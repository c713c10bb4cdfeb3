"""Held-out data during training: the loss of its answers, and how many of them the model would give, by task.

Both come from one forward pass of question and answer. An answer counts as given when each of its tokens, the one that
ends it included, is the likeliest after those before it: exactly then greedy decoding gives this answer, token by
token. So nothing is generated, and no logits are kept; another spelling of an answer does not count, which
`llava-mixlora eval` lets pass (case, a dot at the end).

The loss is the mean over all supervised tokens of the held-out data, whatever the batches and processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction

from ..data.check import DataCheck
from ..errors import MixLoraError
from ..method.model_inputs import IGNORE_INDEX
from .given_flags import is_true, trains_adapter
from .task_labels import LABEL

TASK_NUMBERS = "mixlora_held_out_tasks"
"""What a batch of held-out data calls the numbers of its samples' tasks, int64 [B, 1]; -1 where a sample names none."""
PREFIX = "eval_"
"""What a Trainer puts before the names of metrics."""
LOSS, EXACT_MATCH = "loss", "exact_match"
ASKING_FOR_EVALUATION = ("eval_image_folder", "early_stopping_patience", "metric_for_best_model", "eval_steps")


def check_held_out(flags: Mapping[str, str]) -> None:
    """Check the flags of held-out data, before the data is read.

    Raises:
        MixLoraError: it is the data to train on, or flags ask for evaluation without data, or in a run that trains no
            adapter.
    """
    data = flags.get("eval_data_path")
    if not trains_adapter(flags):
        if data:
            raise MixLoraError(
                f"--eval_data_path {data} is for runs that train an adapter; add --mixlora_enable True or "
                "--lora_enable True, or leave it out"
            )
        return
    if not data:
        _refuse_without_data(flags)
        return
    if data == flags.get("data_path"):
        raise MixLoraError(
            f"--eval_data_path {data} is --data_path too; expected samples that the run does not train on"
        )


def check_metric(flags: Mapping[str, str], held_out: DataCheck | None) -> None:
    """Refuse a name in `--metric_for_best_model` that no metric of the held-out data has, or a task that is no name.

    Raises:
        MixLoraError: with the names that there are.
    """
    if held_out is None:
        return
    tasks = sorted({task for task in tasks_of(held_out.samples, held_out.path) if task is not None})
    metric = flags.get("metric_for_best_model")
    known = [LOSS, EXACT_MATCH, *(f"{EXACT_MATCH}_{task}" for task in tasks)]
    if metric is not None and metric.removeprefix(PREFIX) not in known:
        shown = ", ".join(PREFIX + name for name in known[:8]) + (", ..." if len(known) > 8 else "")
        raise MixLoraError(
            f"--metric_for_best_model {metric}: no such metric of {held_out.path}; expected one of {shown}"
        )


def tasks_of(samples: Sequence[Mapping[str, Any]], data: str = "the held-out data") -> list[str | None]:
    """The name in each sample's field `"task"`; None where there is none.

    Raises:
        MixLoraError: a name is no text, or empty.
    """
    for place, sample in enumerate(samples):
        task = sample.get(LABEL)
        if task is not None and not (isinstance(task, str) and task.strip()):
            raise MixLoraError(
                f"{data}: entry {place} has {LABEL}={task!r}; expected the name of a task, or no {LABEL}"
            )
    return [sample.get(LABEL) for sample in samples]


def _refuse_without_data(flags: Mapping[str, str]) -> None:
    asking = [name for name in ASKING_FOR_EVALUATION if name in flags]
    asking += [name for name in ("load_best_model_at_end", "do_eval", "eval_on_start") if is_true(flags, name)]
    for name in ("eval_strategy", "evaluation_strategy"):
        asking += [name] if flags.get(name, "no") != "no" else []
    if asking:
        raise MixLoraError(
            f"--{asking[0]} {flags[asking[0]]} needs held-out data; add --eval_data_path FILE (LLaVA's format), or "
            "leave it out"
        )


class HeldOutData(Dataset):
    """Upstream's data set of held-out samples, whose items name their task by its number.

    Args:
        samples: upstream's `LazySupervisedDataset`.
        tasks: of each sample, the name of its task or None.
    """

    def __init__(self, samples: Dataset, tasks: Sequence[str | None]) -> None:
        self.samples = samples
        self.tasks = sorted({task for task in tasks if task is not None})
        numbers = {task: number for number, task in enumerate(self.tasks)}
        self.numbers = [numbers.get(task, -1) for task in tasks]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.samples[index], TASK_NUMBERS: self.numbers[index]}


def description(held_out: HeldOutData, trained_on: Dataset, data: str) -> str:
    """A line on held-out data: how many samples and tasks, and how many of them are trained on."""
    asked = {_asked(sample) for sample in trained_on.list_data_dict}
    known = sum(_asked(sample) in asked for sample in held_out.samples.list_data_dict)
    overlap = f"; note: {known} have the picture and the question of a training sample" if known else ""
    return f"held-out data: {len(held_out)} samples, {len(held_out.tasks)} tasks ({data}){overlap}"


def _asked(sample: Mapping[str, Any]) -> tuple[str, str]:
    """A sample's picture and its first turn."""
    return str(sample.get("image")), str(sample["conversations"][0].get("value"))


class HeldOutCollator:
    """A data collator that also makes batches of [`HeldOutData`], beside those of training.

    Args:
        collator: makes the batches of training.
        of_samples: makes a batch of held-out samples, which need not be of the tasks that the run trains on.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], of_samples: Callable[[list[Any]], Any]) -> None:
        self.collator, self.of_samples = collator, of_samples

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of `samples`; of held-out ones with their tasks' numbers, `TASK_NUMBERS`."""
        if TASK_NUMBERS not in samples[0]:
            return self.collator(samples)
        dropped = (TASK_NUMBERS, LABEL)
        batch = self.of_samples([{key: sample[key] for key in sample if key not in dropped} for sample in samples])
        batch[TASK_NUMBERS] = torch.tensor([[sample[TASK_NUMBERS]] for sample in samples])
        return batch


def figures(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each sample: summed loss of its answers' tokens, their number, right answers, answers; float32 [B, 4].

    Args:
        logits: [B, S, V].
        labels: int64 [B, S], -100 where nothing is supervised. Answers are runs of supervised tokens.
    """
    labels = labels[:, 1:].to(logits.device)
    answered = labels != IGNORE_INDEX
    predictions, truth = logits[:, :-1][answered].float(), labels[answered]  # of answers alone: [N, V], not [B, S, V]
    losses = torch.zeros(answered.shape, device=logits.device)
    losses[answered] = F.cross_entropy(predictions, truth, reduction="none")
    wrong = torch.zeros_like(answered)
    wrong[answered] = predictions.argmax(dim=-1) != truth
    begins = answered & ~F.pad(answered, (1, 0))[:, :-1]
    number = begins.cumsum(dim=1)  # of the answer that a position is in or behind, from 1
    answers = number[:, -1]
    mistakes = wrong.new_zeros(len(labels), labels.shape[1] + 1, dtype=torch.int64).scatter_add(1, number, wrong.long())
    counts = torch.arange(mistakes.shape[1], device=labels.device)
    right = ((mistakes == 0) & (counts >= 1) & (counts <= answers.unsqueeze(1))).sum(dim=1)
    return torch.stack([losses.sum(dim=1), answered.sum(dim=1), right, answers], dim=1).float()


class HeldOutMetrics:
    """What a Trainer calls to make metrics of the [`figures`] of all held-out samples: `compute_metrics`.

    Args:
        tasks: names of the tasks, in the order of their numbers.
        data: where the samples come from, for an error.
    """

    def __init__(self, tasks: Sequence[str], data: str) -> None:
        self.tasks, self.data = tasks, data

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss and shares of right answers: `loss`, `exact_match`, `exact_match_TASK`.

        Raises:
            MixLoraError: no token of any answer is left to predict.
        """
        rows, numbers = (_joined(each) for each in (prediction.predictions, prediction.label_ids))
        loss, tokens, right, answers = rows.sum(axis=0, dtype=numpy.float64)
        if not tokens:
            raise MixLoraError(
                f"--eval_data_path {self.data}: no answer has a token to predict; does --model_max_length cut all off?"
            )
        metrics = {LOSS: loss / tokens, EXACT_MATCH: right / answers}
        for number, task in enumerate(self.tasks):
            of_task = rows[numbers[:, 0] == number].sum(axis=0, dtype=numpy.float64)
            if of_task[3]:
                metrics[f"{EXACT_MATCH}_{task}"] = of_task[2] / of_task[3]
        return {name: float(value) for name, value in metrics.items()}


def _joined(batches: Any) -> numpy.ndarray:
    return numpy.concatenate(batches) if isinstance(batches, list) else numpy.asarray(batches)


@contextmanager
def labels_of_the_sequence(llava: nn.Module) -> Iterator[list[Tensor]]:
    """Lists the labels [B, S] of each forward pass in the body, as they are once image features are in the sequence.

    `llava` is upstream's bare model. It lists nothing of one that sees no images, whose labels stay as they are.
    """
    seen: list[Tensor] = []
    prepare = getattr(llava, "prepare_inputs_labels_for_multimodal", None)
    if prepare is None:
        yield seen
        return

    def prepare_and_note(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        prepared = prepare(*args, **kwargs)
        seen.append(prepared[-1])
        return prepared

    llava.prepare_inputs_labels_for_multimodal = prepare_and_note  # hides the class's method
    try:
        yield seen
    finally:
        del llava.prepare_inputs_labels_for_multimodal


@contextmanager
def same_draws_afterwards(device: torch.device) -> Iterator[None]:
    """Leave all generators of random numbers as they are: a DataLoader draws a seed from them for its workers."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)
