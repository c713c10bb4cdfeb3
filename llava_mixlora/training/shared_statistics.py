"""Routing statistics of all processes of a training run, the same in each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..method.layer import MixLoraLayer


class SharedStatistics(TrainerCallback):
    """Makes the statistics in a model's layers sum what every process sees, not only this one.

    While a step runs, gradient accumulation included, each process counts its own instances; when the step is done,
    what was counted since the last one is summed over the processes. So whichever process saves, and however it does,
    after any step: the counts are those of one process that saw all the data. Counts that a resumed run has loaded,
    which every process loads, are no news and are not summed.
    """

    def __init__(self) -> None:
        self._shared: list[Tensor] = []  # what every process has, of all layers in a row: counts, then moments

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take note of the counts that an earlier run has left, which every process has."""
        self._shared = [_in_a_row(sums) for sums in _statistics(model)]

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
        for sums, shared in zip(_statistics(model), self._shared):
            news = _in_a_row(sums) - shared
            distributed.all_reduce(news)
            shared += news
            for of_layer, of_all in zip(sums, shared.split([of_layer.numel() for of_layer in sums])):
                of_layer.copy_(of_all.view_as(of_layer))


def share_statistics(trainer: Trainer) -> None:
    """Add a [`SharedStatistics`] to a Trainer whose model has MixLoRA layers; does nothing the second time."""
    if not _statistics(trainer.model)[0] or any(
        isinstance(c, SharedStatistics) for c in trainer.callback_handler.callbacks
    ):
        return
    trainer.add_callback(SharedStatistics())
    # It would overwrite the counts of all processes with those of the first, possibly in the middle of a step.
    names = [name for name, _ in trainer.model.named_buffers() if "mixlora_stats" in name]
    ignored = getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trainer.model, [*ignored, *names])


def _statistics(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The buffers themselves, of every layer and adapter: counts, int64 [2, E] each, and moments, float64 [4, E, E]."""
    layers = [module for module in model.modules() if isinstance(module, MixLoraLayer)]
    counts = [count for layer in layers for count in layer.mixlora_stats_usage.values()]
    return counts, [bits.view(torch.float64) for layer in layers for bits in layer.mixlora_stats_moments.values()]


def _in_a_row(sums: list[Tensor]) -> Tensor:
    return torch.cat([of_layer.flatten().to(sums[0].device) for of_layer in sums])
