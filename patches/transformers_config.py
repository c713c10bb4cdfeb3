"""`transformers.configuration_utils`: the `config.json` that train() writes beside an adapter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from .llava_train import running_arguments
from .patch import FAULT, Patch


def _without_training_quantization(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        flags = running_arguments()
        quantized_for_training = flags is not None and flags.lora_enable and flags.bits in (4, 8)
        if quantized_for_training and hasattr(self, "quantization_config"):
            self = copy.copy(self)  # the model in training goes on to need its own
            del self.quantization_config
        original(self, *args, **kwargs)

    return save_pretrained


QUANTIZED = (
    "train() saves the configuration of the model that it has quantized, after which the adapter would load on no base "
    "but a quantized one; how a run stores its frozen weights is no property of its adapter"
)
PATCHES = (
    Patch(
        "transformers.configuration_utils:PreTrainedConfig.save_pretrained",
        kind=FAULT,
        why=QUANTIZED,
        replace=_without_training_quantization,
        requires={"transformers": ">=5"},
    ),
    Patch(
        "transformers.configuration_utils:PretrainedConfig.save_pretrained",
        kind=FAULT,
        why=QUANTIZED,
        replace=_without_training_quantization,
        requires={"transformers": "<5"},
    ),
)
