"""Routing figures in a Trainer's logs, and so in whatever `--report_to` names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..method.layer import MixLoraLayer
from ..method.routing_statistics import POOLS, dead_share, router_entropy, usage_balance


class RoutingCallback(TrainerCallback):
    """Adds to each training log, for pool A and pool B, means over the adapted layers since the log before.

    `mixlora_router_entropy_A` and `_B`: entropy of the routers' probabilities (not with `routing="random"`);
    `mixlora_dead_share_A` and `_B`: share of factors that no instance chose; `mixlora_usage_balance_A` and `_B`: share
    of the pool in effective use. `routing_statistics` has the formulas. Shares and balance are of all processes where
    [`shared_statistics`] sums the counts; the entropy is of what this process saw.

    Trainer calls callbacks in order and passes the logs along, so this one has to come before those that report:
    see [`add_routing_callback`].
    """

    def __init__(self) -> None:
        self._counted: dict[str, Tensor] = {}
        self._entropy = _Mean()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Leave out what an earlier run of this adapter has counted."""
        self._counted, self._entropy = dict(_usage(model)), _Mean()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Note the routers' entropy in a batch of gradient accumulation."""
        self._entropy.add(_entropies(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Note the routers' entropy in the batch that completed a step."""
        self._entropy.add(_entropies(model))

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

    def _figures(self, model: nn.Module) -> dict[str, float]:
        counted = dict(_usage(model))
        since = [count - self._counted[adapter] for adapter, count in counted.items() if adapter in self._counted]
        figures = {}
        if since and any(bool(count.any()) for count in since):
            dead = torch.cat([dead_share(count) for count in since])  # [layers, 2]
            balance = torch.cat([usage_balance(count) for count in since])
            figures.update(_by_pool("mixlora_dead_share", dead.mean(dim=0)))
            figures.update(_by_pool("mixlora_usage_balance", balance.nanmean(dim=0)))  # NaN: a layer that was not run
        if self._entropy.count:
            figures.update(_by_pool("mixlora_router_entropy", self._entropy.total / self._entropy.count))
        self._counted, self._entropy = counted, _Mean()
        return figures


def add_routing_callback(trainer: Trainer) -> None:
    """Put a [`RoutingCallback`], or the one that is there, before all others, if the model has MixLoRA layers."""
    if any(isinstance(module, MixLoraLayer) for module in trainer.model.modules()):
        present = trainer.pop_callback(RoutingCallback)
        trainer.callback_handler.callbacks.insert(0, present or RoutingCallback())


class _Mean:
    """A sum of rows [2] that stays on its device, and their number."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, rows: Tensor | None) -> None:
        if rows is not None:
            self.total = self.total + rows.sum(dim=0)
            self.count += len(rows)


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


def _by_pool(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_{pool}": value for pool, value in zip(POOLS, values.tolist())}
