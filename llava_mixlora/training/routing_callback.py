"""Routing figures in a Trainer's logs, and so in whatever `--report_to` names; counts of all of its processes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..method.layer import MixLoraLayer
from ..method.routing_statistics import POOLS, dead_share, router_entropy, usage_balance
from ..method.shared_sums import remember_all
from .shared_statistics import leave_to_each_process, share_statistics


class RoutingCallback(TrainerCallback):
    """What a Trainer needs for MixLoRA: `Trainer(model, ..., callbacks=[RoutingCallback()])`.

    It sums the statistics over the processes after each step ([`share_statistics`]), so that whichever process saves,
    they are those of one that saw all the data. And it adds to each training log, for pool A and pool B, means over the
    adapted layers since the log before:

    `mixlora_router_entropy_A` and `_B`: entropy of the routers' probabilities (not with `routing="random"`);
    `mixlora_dead_share_A` and `_B`: share of factors that no instance chose; `mixlora_usage_balance_A` and `_B`: share
    of the pool in effective use. `routing_statistics` has the formulas. Shares and balance are of all processes; the
    entropy is of what this process saw. With `pairing="same"`, whose one router chooses for both pools, there are the
    figures of pool A alone: those of pool B would be the same.

    A Trainer puts its reporters before the callbacks that it is given, calls all in order and passes the logs along. So
    this one moves itself to the front, when the Trainer has been made and again when training begins. Where something
    other than a Trainer calls it, reporters that come before it see logs without the figures.
    """

    def __init__(self) -> None:
        self._counted: dict[str, Tensor] = {}
        self._entropy = _Mean()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Come before reporters, and keep the counts of each process apart where data parallelism would mix them."""
        self._move_to_the_front()
        if model is not None:
            leave_to_each_process(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Leave out what an earlier run of this adapter has counted, which every process has."""
        self._move_to_the_front()
        if not _is_adapted(model):
            warnings.warn(
                f"RoutingCallback: {type(model).__name__} has no MixLoRA layers to tell of; make it with "
                "get_peft_model(model, MixLoraConfig())",
                stacklevel=2,
            )
        remember_all(model)
        self._counted, self._entropy = dict(_usage(model)), _Mean()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Note the routers' entropy in a batch of gradient accumulation."""
        self._entropy.add(_entropies(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Sum what the processes have counted in this step, and note the routers' entropy in its last batch."""
        self._share(model)
        self._entropy.add(_entropies(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Sum what was counted after the last step, where training was stopped within one."""
        self._share(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to `logs`, and to the entry that the Trainer has already made of them."""
        if model is None or logs is None or "loss" not in logs:
            return
        figures = self._figures(model)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("loss") == logs["loss"]:
            state.log_history[-1].update(figures)

    def _share(self, model: nn.Module) -> None:
        if _is_adapted(model):
            share_statistics(model)

    def _move_to_the_front(self) -> None:
        # A callback is told of everything but the handler that calls it, which stands in one of its callers.
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks.remove(self)  # the handler, which is at this one, then goes on with the next
                handler.callbacks.insert(0, self)
                return
            frame = frame.f_back

    def _figures(self, model: nn.Module) -> dict[str, float]:
        counted = dict(_usage(model))
        since = [count - self._counted[adapter] for adapter, count in counted.items() if adapter in self._counted]
        pools = _pools(model)
        figures = {}
        if since and any(bool(count.any()) for count in since):
            dead = torch.cat([dead_share(count) for count in since])  # [layers, 2]
            balance = torch.cat([usage_balance(count) for count in since])
            figures.update(_by_pool("mixlora_dead_share", dead.mean(dim=0), pools))
            figures.update(_by_pool("mixlora_usage_balance", balance.nanmean(dim=0), pools))  # NaN: a layer not run
        if self._entropy.count:
            figures.update(_by_pool("mixlora_router_entropy", self._entropy.total / self._entropy.count, pools))
        self._counted, self._entropy = counted, _Mean()
        return figures


def add_routing_callback(trainer: Trainer) -> None:
    """Put a [`RoutingCallback`], or the one that is there, before all others, if the model has MixLoRA layers.

    For a Trainer that exists already; to one that is being made, give the callback itself.
    """
    if _is_adapted(trainer.model):
        present = trainer.pop_callback(RoutingCallback)
        trainer.callback_handler.callbacks.insert(0, present or RoutingCallback())
        leave_to_each_process(trainer.model)


class _Mean:
    """A sum of rows [2] that stays on its device, and their number."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, rows: Tensor | None) -> None:
        if rows is not None:
            self.total = self.total + rows.sum(dim=0)
            self.count += len(rows)


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, MixLoraLayer) for module in model.modules())


def _active(model: nn.Module) -> Iterator[tuple[MixLoraLayer, str]]:
    for module in model.modules():
        if isinstance(module, MixLoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.mixlora_A:
                    yield module, adapter


def _usage(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By active adapter: a copy of the counts of its layers, [layers, 2, E]."""
    by_adapter: dict[str, list[Tensor]] = {}
    for layer, adapter in _active(model):
        by_adapter.setdefault(adapter, []).append(layer.mixlora_stats_usage[adapter])
    for adapter, counts in by_adapter.items():
        yield adapter, torch.stack([count.to(counts[0].device) for count in counts])


def _entropies(model: nn.Module) -> Tensor | None:
    """Of every layer's routers in the last forward pass, its mean over the instances, [layers, 2]."""
    alike: dict[Any, list[Tensor]] = {}  # layers whose scores can be computed with in one go
    for layer, adapter in _active(model):
        route = layer.last_routes.get(adapter)
        if route is not None and route.score_A is not None:
            key = route.score_A.shape, route.score_A.device
            alike.setdefault(key, []).append(torch.stack((route.score_A, route.score_B)))
    rows = [router_entropy(torch.stack(scores)).mean(dim=-1) for scores in alike.values()]
    return torch.cat([row.to(rows[0].device) for row in rows]) if rows else None


def _pools(model: nn.Module) -> Sequence[str]:
    """Those whose figures differ: A alone where all active adapters have one choice for both."""
    return POOLS[:1] if all(layer.settings[name].pairing == "same" for layer, name in _active(model)) else POOLS


def _by_pool(name: str, values: Tensor, pools: Sequence[str]) -> dict[str, float]:
    return {f"{name}_{pool}": value for pool, value in zip(pools, values.tolist())}
