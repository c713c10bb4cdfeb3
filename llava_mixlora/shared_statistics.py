"""Routing statistics of all processes of a training run, the same in each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .layer import MixLoraLayer


class SharedStatistics(TrainerCallback):
    """Makes `mixlora_stats_usage` count the instances of every process, not only of this one.

    While a step runs, gradient accumulation included, each process counts its own instances; when the step is done,
    what was counted since the last one is summed over the processes. So whichever process saves, and however it does,
    after any step: the counts are those of one process that saw all the data. Counts that a resumed run has loaded,
    which every process loads, are no news and are not summed.
    """

    def __init__(self) -> None:
        self._shared: Tensor | None = None  # counts that every process has, of all layers in a row

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take note of the counts that an earlier run has left, which every process has."""
        self._shared = _in_a_row(_counts(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Sum what the processes have counted in this step; every process gets here."""
        self._share(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Sum what was counted after the last step, where training was stopped within one."""
        self._share(model)

    def _share(self, model: nn.Module) -> None:
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        counts = _counts(model)
        news = _in_a_row(counts) - self._shared
        distributed.all_reduce(news)
        self._shared += news
        for count, shared in zip(counts, self._shared.split([count.numel() for count in counts])):
            count.copy_(shared.view_as(count))


def share_statistics(trainer: Trainer) -> None:
    """Add a [`SharedStatistics`] to a Trainer whose model has MixLoRA layers; does nothing the second time."""
    if not _counts(trainer.model) or any(isinstance(c, SharedStatistics) for c in trainer.callback_handler.callbacks):
        return
    trainer.add_callback(SharedStatistics())
    # It would overwrite the counts of all processes with those of the first, possibly in the middle of a step.
    names = [name for name, _ in trainer.model.named_buffers() if "mixlora_stats" in name]
    ignored = getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trainer.model, [*ignored, *names])


def _counts(model: nn.Module) -> list[Tensor]:
    """The buffers themselves, int64 [2, E] each, of every layer and adapter."""
    layers = (module for module in model.modules() if isinstance(module, MixLoraLayer))
    return [count for layer in layers for count in layer.mixlora_stats_usage.values()]


def _in_a_row(counts: list[Tensor]) -> Tensor:
    return torch.cat([count.flatten().to(counts[0].device) for count in counts])
