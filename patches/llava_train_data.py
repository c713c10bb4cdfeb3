"""`llava.train.train`: what the run's data become on their way into batches."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llava_mixlora.data.images import open_image
from llava_mixlora.errors import MixLoraError
from llava_mixlora.llava_package import TRAIN, used
from llava_mixlora.training.run_data import agree
from llava_mixlora.training.task_labels import LABEL, TaskLabels
from llava_mixlora.training.turns import counts_turns_alone

from .llava_arch import find_answers_of
from .llava_train import running_tasks, running_train
from .patch import COMPATIBILITY, FAULT, METHOD, Patch


def _take_checked_data(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, data_path: str, tokenizer: Any, data_args: Any) -> None:
        self.data_path, running = data_path, running_train()
        data = None if running is None or running.data is None else running.data.of(data_path)
        if data is None:
            return original(self, data_path, tokenizer, data_args)
        agree(data)
        self.tokenizer, self.list_data_dict, self.data_args = tokenizer, data.samples, data_args
        self.entry_numbers = data.numbers

    return __init__


def _open_as_viewers_do(original: Any) -> Any:
    return SimpleNamespace(**{**vars(original), "open": open_image})


def _name_the_entry(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __getitem__(self: Any, i: int) -> Any:
        try:
            return original(self, i)
        except Exception as error:
            number = getattr(self, "entry_numbers", range(len(self)))[i]
            what = str(error) if isinstance(error, MixLoraError) else f"{type(error).__name__}: {error}"
            raise MixLoraError(f"{self.data_path}: entry {number}: {' '.join(what.split())}") from error

    return __getitem__


def _keep_task(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __getitem__(self: Any, i: int) -> Any:
        item, sample = original(self, i), self.list_data_dict[i]
        if LABEL in sample:
            item[LABEL] = sample[LABEL]
        return item

    return __getitem__


def _know_legacy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess_v1(sources: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(tokenizer, "legacy"):
            tokenizer.legacy = counts_turns_alone(tokenizer)
        return original(sources, tokenizer, *args, **kwargs)

    return preprocess_v1


def _with_two_marks(original: Callable[..., Any]) -> Callable[..., Any]:
    if not used().places(f"{TRAIN}:preprocess_qwen"):
        return original
    copies: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(original)
    def preprocess(sources: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        further = getattr(tokenizer, "additional_special_tokens", None) or []
        if len(further) > len(MARKS) and set(MARKS) <= set(further):
            if id(tokenizer) not in copies:
                copied = copy.deepcopy(tokenizer)
                copied.additional_special_tokens = [*MARKS]
                copies[id(tokenizer)] = tokenizer, copied  # while it is kept, no other has its id
            copied = copies[id(tokenizer)][1]
            copied.model_max_length = tokenizer.model_max_length
            tokenizer = copied
        return original(sources, tokenizer, *args, **kwargs)

    return preprocess


MARKS = "<|im_start|>", "<|im_end|>"
"""Of Qwen's template."""


def _prepare_for_routers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_supervised_data_module(*args: Any, **kwargs: Any) -> Any:
        module, tasks = original(*args, **kwargs), running_tasks()
        find_answers_of(inspect.signature(original).bind(*args, **kwargs).arguments["tokenizer"])
        if tasks is not None:
            # The collator, not the process, knows the tasks: workers of a DataLoader may be new processes.
            module["data_collator"] = TaskLabels(module["data_collator"], tasks)
        return module

    return make_supervised_data_module


PATCHES = (
    Patch(
        "llava.train.train:LazySupervisedDataset.__init__",
        kind=FAULT,
        why="it takes whatever the file holds; a run of adapters trains on what was read and checked before",
        replace=_take_checked_data,
        parameters=("data_path", "tokenizer", "data_args"),
    ),
    Patch(
        "llava.train.train:Image",
        kind=FAULT,
        why="images should be seen as viewers show them: turned by their EXIF orientation, 16 bits scaled, not clipped",
        replace=_open_as_viewers_do,
    ),
    Patch(
        "llava.train.train:LazySupervisedDataset.__getitem__",
        kind=FAULT,
        why="a sample that cannot be read should name its file and entry",
        replace=_name_the_entry,
        parameters=("i",),
    ),
    Patch(
        "llava.train.train:LazySupervisedDataset.__getitem__",
        kind=METHOD,
        why="it drops the field 'task' of a sample, which --mixlora_task_loss_weight learns from",
        replace=_keep_task,
        parameters=("i",),
    ),
    Patch(
        "llava.train.train:preprocess_v1",
        kind=COMPATIBILITY,
        why="it asks the tokenizer whether it is a `legacy` one, which that of a Mistral no longer tells",
        replace=_know_legacy,
        parameters=("sources", "tokenizer"),
        requires={"transformers": ">=5"},
    ),
    Patch(
        "llava.train.train:preprocess",
        kind=FAULT,
        why="LLaVA-NeXT takes all further special tokens of a Qwen for the two of its template, and Qwen2.5 has more",
        replace=_with_two_marks,
        parameters=("sources", "tokenizer"),
    ),
    Patch(
        "llava.train.train:make_supervised_data_module",
        kind=METHOD,
        why="its collator makes the batch, which tells the model each sample's task with --mixlora_task_loss_weight, "
        "and its tokenizer tells where answers begin",
        replace=_prepare_for_routers,
        parameters=("tokenizer", "data_args"),
    ),
)
