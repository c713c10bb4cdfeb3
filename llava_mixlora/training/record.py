"""What the model card tells of a run of `llava.train.train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..adapters.llava_card import llava_record
from ..data.check import DataCheck
from ..method.model_card import TrainingRecord
from .checkpoint import sha256_of
from .continuing import description_of

HYPERPARAMETERS = (
    *("learning_rate", "mixlora_router_lr", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "num_train_epochs", "max_steps"),
    *("model_max_length", "optim", "bits", "bf16", "fp16", "seed", "mixlora_preset"),
)


def training_record(data: DataCheck | None, flags: Any) -> TrainingRecord:
    """Data and hyperparameters of the run; of the data only in the process that writes the card.

    Args:
        data: what the check of the data has found.
        flags: upstream's `TrainingArguments`, as parsed.
    """
    told = {name: getattr(flags, name) for name in HYPERPARAMETERS if getattr(flags, name, None) not in (None, "", -1)}
    record = llava_record()
    record.hyperparameters = {name: _plain(value) for name, value in told.items()}
    if data is not None and os.environ.get("RANK", "0") == "0":
        record.data, record.samples = Path(data.path).name, data.usable
        record.sha256 = sha256_of(Path(data.path))
    if flags.mixlora_init_from is not None:
        record.continues = description_of(flags.mixlora_init_from)
    return record


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enum
