"""DeepSpeed's ZeRO-3, which keeps every parameter in partitions, one on each process: what LLaVA runs need for it.

DeepSpeed partitions the base model while that is loaded, and what is added later (adapters, a new projector) when
training begins. It gathers a parameter for the module that owns it; those of a MixLoRA layer are owned by
`ParameterDict`s, which have no forward pass, and DeepSpeed sees by itself that the layer reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .patch import FAULT, Patch


def _join_processes_first(original: type) -> type:
    def __post_init__(self: Any) -> None:
        original.__post_init__(self)
        if is_deepspeed_zero3_enabled():
            import deepspeed

            deepspeed.init_distributed()  # takes over the process group that TrainingArguments has made, if it has

    # The class keeps its name and module, by which Trainer pickles it into training_args.bin.
    identity = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return dataclass(type(original.__name__, (original,), {**identity, "__post_init__": __post_init__}))


def _cast_model(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_deepspeed_zero3_enabled():
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            cast_for_zero3(self.model, dtype)

    return __init__


def cast_for_zero3(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Do the casts that ZeRO-3 leaves out.

    A partitioned parameter holds no values, so `module.to(dtype)` changed the dtype that it names and not that of its
    partition. Float parameters that are not partitioned yet get `dtype`, unless it is None: all that trains must have
    one dtype, the base model's, and the engine casts only models of which no part is partitioned. It keeps float32
    copies of what trains itself.
    """
    for parameter in model.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        if partition is not None:
            if partition.dtype != parameter.dtype:
                partition.data = partition.data.to(parameter.dtype)
        elif dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


PATCHES = (
    Patch(
        "llava.train.train:TrainingArguments",
        kind=FAULT,
        why="the model is loaded in partitions, for which DeepSpeed must know the other processes, on a CPU too",
        replace=_join_processes_first,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=FAULT,
        why="casts do not reach partitions, and adapters are added in float32 to a model that is partitioned already",
        replace=_cast_model,
    ),
)
