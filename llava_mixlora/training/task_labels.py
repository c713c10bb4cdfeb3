"""The tasks of training data (`task_loss_weight`): which there are, and each instance's on its way to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import MixLoraError
from ..method.forward_passes import TASKS

LABEL = "task"
"""The field of a sample that names its task."""
NAMED_AT_MOST = 10


class TaskLabels:
    """A data collator that tells the model each instance's task, around the collator that makes the rest of the batch.

    Every sample is a dict with the name of its task in the field `"task"`. The wrapped collator gets it without that,
    and the batch gains `mixlora_tasks`, int64 [B], which a model with `task_loss_weight` above 0 takes. It can be
    pickled if the wrapped one can, as DataLoader workers may need; attributes are those of the wrapped one.

    A Trainer removes the fields of samples that the model's `forward` does not name, `"task"` among them, unless it is
    told `remove_unused_columns=False`. Then the wrapped collator gets all other fields, so leave only those in the data
    that it can make into inputs of the model.

    ```python
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator
    from llava_mixlora import MixLoraConfig, TaskLabels
    from llava_mixlora.training.task_labels import task_names

    ids = torch.randint(3, 128, (8, 12))
    labels = torch.where(torch.arange(12) < 8, -100, ids)
    names = 4 * ["counting", "color"]
    samples = [{"input_ids": ids[i], "labels": labels[i], "task": names[i]} for i in range(8)]
    tasks = task_names(samples)  # ["color", "counting"]
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    config = MixLoraConfig(pairing="same", task_loss_weight=0.1, tasks=tasks, task_type="CAUSAL_LM")
    arguments = TrainingArguments("output", max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True)
    collator = TaskLabels(default_data_collator, tasks)
    Trainer(get_peft_model(base, config), arguments, train_dataset=samples, data_collator=collator).train()
    ```

    Args:
        collator: makes a batch, something to which an item can be assigned, of a list of samples.
        tasks: names of all tasks, as in `MixLoraConfig.tasks`.

    Raises:
        MixLoraError: `tasks` is no list of different names. In a call: a sample names no task, or one that is not
            among them.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], tasks: Sequence[str]) -> None:
        named = isinstance(tasks, (list, tuple)) and all(isinstance(task, str) for task in tasks)
        if not named or not tasks or len(set(tasks)) < len(tasks):
            raise MixLoraError(
                f"TaskLabels: tasks={tasks!r}, expected a list of different names, as in MixLoraConfig(tasks=...); "
                "task_names(samples) finds those of a data set"
            )
        self.collator = collator
        self.tasks = tuple(tasks)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """The wrapped collator's batch of `samples`, with `mixlora_tasks` int64 [B]."""
        numbers = {task: number for number, task in enumerate(self.tasks)}
        found = []
        for place, sample in enumerate(samples):
            task = _task_of(sample)
            if task is None:
                raise MixLoraError(
                    f"{_which(sample, f'sample {place} of a batch')} has {_instead(sample)}; give every sample the "
                    "name of its task, and a Trainer TrainingArguments(remove_unused_columns=False), or it removes them"
                )
            if task not in numbers:
                raise MixLoraError(
                    f"{_which(sample, f'sample {place} of a batch')} has task={task!r}; expected one of "
                    f"{_shortened(self.tasks)}; name all tasks of the data in MixLoraConfig(tasks=...)"
                )
            found.append(numbers[task])
        batch = self.collator([{key: sample[key] for key in sample if key != LABEL} for sample in samples])
        batch[TASKS] = torch.tensor(found, dtype=torch.int64)
        return batch

    def __getattr__(self, name: str) -> Any:
        # A Trainer without a tokenizer saves the collator's. While it is unpickled, there is no collator yet.
        if name.startswith("_") or name == "collator":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.collator, name)


def task_names(samples: Iterable[Mapping[str, Any]], data: str = "the data") -> list[str]:
    """The different names in the field `"task"` of samples, sorted: what `MixLoraConfig.tasks` and `TaskLabels` take.

    It reads every sample once. Of a `datasets.Dataset` with images, which that would decode, give
    `dataset.select_columns("task")`.

    Args:
        samples: LLaVA's conversations, or any dicts.
        data: what to call them in an error, such as the file that they come from.

    Raises:
        MixLoraError: there are no samples, or one names no task.
    """
    found = set()
    for place, sample in enumerate(samples):
        task = _task_of(sample)
        if task is None:
            raise MixLoraError(
                f"{data}: {_which(sample, f'sample {place}')} has {_instead(sample)}, which task_loss_weight needs; "
                "give every sample the name of its task, or leave task_loss_weight at 0"
            )
        found.add(task)
    if not found:
        raise MixLoraError(f"{data}: no samples; expected some with the names of their tasks in the field {LABEL!r}")
    return sorted(found)


def _task_of(sample: Any) -> str | None:
    task = sample.get(LABEL) if isinstance(sample, Mapping) else None
    return task if isinstance(task, str) and task.strip() else None


def _which(sample: Any, place: str) -> str:
    name = sample.get("id") if isinstance(sample, Mapping) else None
    return f"sample {name!r}" if isinstance(name, (str, int)) else place


def _instead(sample: Any) -> str:
    """What a sample has in the place of a task's name."""
    if not isinstance(sample, Mapping):
        return f"no fields (it is of type {type(sample).__name__}), so no {LABEL!r}"
    if LABEL not in sample:
        return f"no field {LABEL!r}"
    kind = type(sample[LABEL]).__name__
    return f"an empty {LABEL!r}" if kind == "str" else f"a {LABEL!r} of type {kind} (expected a string)"


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:NAMED_AT_MOST]))
    return shown if len(names) <= NAMED_AT_MOST else f"{shown}, ... ({len(names)} in all)"
