"""`llava.train.llava_trainer`: LLaVA's Trainer on today's transformers, the routers' learning rate and their logs."""

from __future__ import annotations

import builtins
import dis
import functools
import sys
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers import Trainer

from llava_mixlora.llava_package import TRAINER, TRAINER_CLASS, part
from llava_mixlora.training.given_flags import given_flags
from llava_mixlora.training.routing_callback import add_routing_callback
from llava_mixlora.training.step_watch import StepWatch
from llava_mixlora.training.trainable_set import check_trainable, thaw_beside

from .patch import COMPATIBILITY, FAULT, METHOD, Patch

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


def _check_what_is_trained(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.model, PeftModel):
            flags = given_flags(sys.argv[1:])
            thaw_beside(self.model, flags, self.args)
            check_trainable(self.model, flags)

    return __init__


def _watch_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model, PeftModel):
            return original(self, model, inputs, *args, **kwargs)
        if not hasattr(self, "_step_watch"):
            self._step_watch = _step_watch(self)
        step = self.state.global_step + 1
        teaches = self._step_watch.teaches(inputs, step)
        loss = original(self, model, inputs, *args, **kwargs)
        if teaches:
            self._step_watch.check_loss(loss, step)
        return loss

    return training_step


def _step_watch(trainer: Any) -> StepWatch:
    base = trainer.model.get_base_model()
    tower = base.get_vision_tower() if hasattr(base, "get_vision_tower") else None  # without --vision_tower, a Llama
    image_tokens = 1 if tower is None else tower.num_patches + (getattr(tower, "select_feature", None) == "cls_patch")
    limit = getattr(base.config, "tokenizer_model_max_length", None) or sys.maxsize
    return StepWatch(image_tokens, limit, trainer.args.fp16)


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


def _loop_that_can_run(original: Callable[..., Any]) -> Callable[..., Any]:
    if not _missing_globals(original):
        return original

    @functools.wraps(original)
    def _inner_training_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Trainer._inner_training_loop(self, *args, **kwargs)

    return _inner_training_loop


def _missing_globals(function: Callable[..., Any]) -> set[str]:
    """Names that a function looks up in its module, and that are neither there nor Python's own."""
    looked_up = {each.argval for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"}
    return looked_up - set(function.__globals__) - set(vars(builtins))


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
    return part(f"{TRAINER}:{TRAINER_CLASS}")


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
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=FAULT,
        why="a run that trains nothing of its adapter, or the base beside it, should end before it begins",
        replace=_check_what_is_trained,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.training_step",
        kind=FAULT,
        why="steps that teach nothing, or whose loss is no number, are taken without a word",
        replace=_watch_steps,
        parameters=("model", "inputs"),
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._inner_training_loop",
        kind=FAULT,
        why="LLaVA-NeXT of 2026 has a copy of Trainer's loop that asks for names that its module lacks, and so trains "
        "nothing (LLaVA-NeXT#483 #493 #504)",
        replace=_loop_that_can_run,
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
