"""Watches the steps of a run: those that teach nothing, and losses that are no number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.token_counts import expanded_places
from ..errors import MixLoraError

IGNORED = -100
IMAGE = -200  # upstream's IMAGE_TOKEN_INDEX
IN_A_ROW = 10
"""Steps without anything to learn, or with half precision of no finite loss, after which a run stops."""


class StepWatch:
    """Looks at each batch, and at its loss, in the process that trains on it.

    Args:
        image_tokens: features of an image in the sequence.
        limit: `--model_max_length`, behind which the model cuts the sequence.
        half_precision: `--fp16`, whose scaler skips steps of no finite gradient.
    """

    def __init__(self, image_tokens: int, limit: int, half_precision: bool = False) -> None:
        self.image_tokens, self.limit, self.half_precision = image_tokens, limit, half_precision
        self.empty = self.empty_in_a_row = self.not_finite_in_a_row = 0

    def teaches(self, inputs: dict[str, Any], step: int) -> bool:
        """Whether any label of the batch is supervised within the limit; a step where none is gets named.

        Args:
            inputs: `input_ids` and `labels` [B, T], before image features are put into the sequence.
            step: its number, from 1.

        Raises:
            MixLoraError: it is the last of [`IN_A_ROW`] such steps.
        """
        labels, ids = inputs["labels"], inputs["input_ids"]
        if bool(((labels != IGNORED) & (expanded_places(ids == IMAGE, self.image_tokens) < self.limit)).any()):
            self.empty_in_a_row = 0
            return True
        self.empty += 1
        self.empty_in_a_row += 1
        if self.empty_in_a_row == IN_A_ROW:
            raise MixLoraError(
                f"step {step}: the last {IN_A_ROW} batches had no token to learn from; raise --model_max_length "
                f"{self.limit}, or see what llava-mixlora check says of the data"
            )
        if self.empty <= IN_A_ROW:
            print(
                f"step {step}: none of the {len(labels)} samples of a batch has a token to learn from within "
                f"--model_max_length {self.limit} ({self.empty} such batches so far)",
                flush=True,
            )
        return False

    def check_loss(self, loss: Tensor, step: int) -> None:
        """Stop a run whose loss is no number, before the optimizer spoils the adapter with it.

        Raises:
            MixLoraError: the loss is not finite; with half precision, [`IN_A_ROW`] times.
        """
        if bool(torch.isfinite(loss).all()):
            self.not_finite_in_a_row = 0
            return
        self.not_finite_in_a_row += 1
        if self.not_finite_in_a_row >= (IN_A_ROW if self.half_precision else 1):
            raise MixLoraError(
                f"step {step}: the loss is {loss.float().mean().item()}; the checkpoints are as they were. Lower "
                "--learning_rate, or train with --bf16 True in the place of --fp16, and go on from the last checkpoint"
            )
