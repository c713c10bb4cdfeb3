"""`llava.train.llava_trainer`: LLaVA's Trainer on today's transformers, the routers' learning rate and their logs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.training.routing_callback import add_routing_callback

from .patch import COMPATIBILITY, METHOD, Patch

ROUTER_PARAMETERS = ("mixlora_router_A", "mixlora_router_B", "mixlora_cfs")


def _rename_tokenizer(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        original(self, *args, **kwargs)

    return __init__


def _log_routing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        add_routing_callback(self)

    return __init__


def _accept_dataset(original: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return original(self)  # LLaVA samples from self.train_dataset, which is what transformers passes

    return _get_train_sampler


def _drop_metrics(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if getattr(self.args, "tune_mm_mlp_adapter", False):
            original(self, model, trial)
        else:
            super(_trainer_class(), self)._save_checkpoint(model, trial)

    return _save_checkpoint


def _separate_router_lr(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_optimizer(self: Any, model: Any = None) -> Any:
        already_made = self.optimizer is not None
        optimizer = original(self)
        router_lr = getattr(self.args, "mixlora_router_lr", None)
        if router_lr is not None and not already_made:
            split_router_groups(optimizer, self.model, router_lr)
        return optimizer

    return create_optimizer


def split_router_groups(optimizer: Any, model: Any, router_lr: float) -> None:
    """Move the routers' parameters of each parameter group into a group of their own with learning rate `router_lr`."""
    routers = {id(p) for n, p in model.named_parameters() if any(kind in n for kind in ROUTER_PARAMETERS)}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in routers]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            optimizer.add_param_group({"params": moved, "lr": router_lr, **settings})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _trainer_class() -> type:
    from llava.train.llava_trainer import LLaVATrainer

    return LLaVATrainer


PATCHES = (
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=COMPATIBILITY,
        why="train() passes the tokenizer as tokenizer=, which Trainer now calls processing_class=",
        replace=_rename_tokenizer,
        requires={"transformers": ">=5"},
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=METHOD,
        why="a MixLoRA run logs how its routers use the factors, counted over all processes, through a callback",
        replace=_log_routing,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._get_train_sampler",
        kind=COMPATIBILITY,
        why="Trainer now passes the dataset to this method",
        replace=_accept_dataset,
        requires={"transformers": ">=4.52"},
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._save_checkpoint",
        kind=COMPATIBILITY,
        why="LLaVA passes metrics on to Trainer._save_checkpoint, which no longer takes them",
        replace=_drop_metrics,
        requires={"transformers": ">=4.47"},
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.create_optimizer",
        kind=METHOD,
        why="--mixlora_router_lr gives the routers a learning rate of their own",
        replace=_separate_router_lr,
    ),
)
