"""`llava.train.llava_trainer`: evaluation on held-out data, which counts right answers and leaves training as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from llava_mixlora.training.held_out import (
    TASK_NUMBERS,
    HeldOutData,
    figures,
    labels_of_the_sequence,
    same_draws_afterwards,
)

from .patch import METHOD, Patch


def _count_right_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prediction_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if TASK_NUMBERS not in inputs:
            return original(self, model, inputs, *args, **kwargs)
        inputs = dict(self._prepare_inputs(inputs))
        tasks = inputs.pop(TASK_NUMBERS)
        llava = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        with torch.no_grad(), self.compute_loss_context_manager(), labels_of_the_sequence(llava) as seen:
            logits = model(**inputs).logits
        # In the place of loss and logits: what HeldOutMetrics makes metrics of, once it is there of all processes.
        return None, figures(logits, seen[-1] if seen else inputs["labels"]), tasks

    return prediction_step


def _leave_draws_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.eval_dataset, HeldOutData):
            return original(self, *args, **kwargs)
        with same_draws_afterwards(self.args.device):
            return original(self, *args, **kwargs)

    return evaluate


PATCHES = (
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.prediction_step",
        kind=METHOD,
        why="Trainer would keep the logits of all held-out data, and LLaVA's labels only fit them inside of the model",
        replace=_count_right_answers,
        parameters=("model", "inputs"),
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.evaluate",
        kind=METHOD,
        why="a DataLoader draws from the global generator, after which training would draw another dropout",
        replace=_leave_draws_alone,
    ),
)
