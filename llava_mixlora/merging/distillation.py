"""A static stand-in that is trained to predict what the dynamic model predicts.

Layer by layer the best static update may still be far off: an update that depends on the instruction also changes what
the image's positions hold, and no static one can do that as it does. What counts is the answer. So the two matrices of
every layer's static update learn, from the best of each layer on, to minimise the KL divergence of the static model's
next tokens from the dynamic model's, at the supervised positions of calibration data. Nothing else changes.

A step costs one forward pass of the dynamic model, and a forward and a backward pass of the static one: it takes the
memory of training a LoRA of rank E with batches of `--batch-size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..inference.samples import Batch
from ..method.model import ADAPTER, adapted_layers
from ..method.model_inputs import IGNORE_INDEX
from .static_adapter import StaticUpdates
from .static_model import static_in_place

STEPS = 400
SAMPLES_PER_STEP = 32
RATE = 0.05
"""The highest learning rate of a matrix, as a share of the root mean square of its entries."""
WARMUP = 0.03  # share of the steps
LARGEST_GRADIENT = 1.0
EXACT = 1e-5
"""nats: a static model that begins nearer than this to the dynamic one is as near as rounding lets it."""


def distilled(
    model: nn.Module, batches: Iterator[Batch], start: StaticUpdates, batch_size: int, steps: int = STEPS
) -> StaticUpdates:
    """Static updates of all adapted layers, of the rank of `start`, on the CPU; `start` itself where that is exact.

    Args:
        model: a PeftModel with a MixLoRA adapter, in evaluation mode. Its parameters learn no more afterwards.
        batches: keyword arguments of the model, without end, of `batch_size` samples each.
        start: where to begin.
        batch_size: how many samples go through the model at a time; a step is [`SAMPLES_PER_STEP`] of them, or one
            batch.
        steps: how many to take.
    """
    layers = adapted_layers(model)
    model.requires_grad_(False)
    factors = {
        name: tuple(nn.Parameter(matrix.to(layers[name].mixlora_A[ADAPTER].device, copy=True)) for matrix in pair)
        for name, pair in start.items()
    }
    trained = [matrix for pair in factors.values() for matrix in pair]
    groups = [{"params": [matrix], "lr": RATE * _root_mean_square(matrix)} for matrix in trained]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
    # Gradients in float16 on the way through the layers would vanish; the matrices themselves are float32.
    halves = next(model.parameters()).dtype == torch.float16
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=halves)
    at_a_time = max(1, SAMPLES_PER_STEP // batch_size)
    with tqdm(range(steps), desc="Distilling", unit="step") as bar:
        for step in bar:
            divergence = _backward(model, factors, list(islice(batches, at_a_time)), scaler)
            if step == 0 and divergence < EXACT:
                return start
            bar.set_postfix(KL=f"{divergence:.4f}")
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
    return {name: tuple(matrix.detach().cpu() for matrix in pair) for name, pair in factors.items()}


def _backward(model: nn.Module, factors: StaticUpdates, batches: list[Batch], scaler: torch.amp.GradScaler) -> float:
    """Add the gradients of the mean KL divergence over the supervised tokens of the batches; returns that mean."""
    tokens = max(1, sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches))
    total = 0.0
    for batch in batches:
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        with torch.no_grad():
            dynamic = _log_probabilities(model, batch, supervised)
        with static_in_place(model, factors):
            static = _log_probabilities(model, batch, supervised)
            divergence = (dynamic.exp() * (dynamic - static)).sum() / tokens
            scaler.scale(divergence).backward()
        total += float(divergence.detach())
    return total


def _log_probabilities(model: nn.Module, batch: Batch, supervised: Tensor) -> Tensor:
    return model(**batch, use_cache=False).logits[:, :-1][supervised].float().log_softmax(dim=-1)


def _root_mean_square(matrix: Tensor) -> float:
    return float(matrix.detach().square().mean().sqrt())


def _share_of_rate(step: int, steps: int) -> float:
    """Of the highest learning rate: a rise over the first steps, then half a cosine."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
