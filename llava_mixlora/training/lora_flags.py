"""The flags of LoRA, on which those of MixLoRA are built: some LLaVAs can only be trained as a whole."""

from __future__ import annotations

import dataclasses

from ..errors import MixLoraError
from ..llava_package import TRAIN, part, used

NEEDED = ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "bits")


def check_lora_flags() -> None:
    """Refuse a LLaVA whose training takes no adapter.

    Raises:
        MixLoraError: its training arguments lack flags of LoRA.
    """
    arguments = part(f"{TRAIN}:TrainingArguments")
    missing = [name for name in NEEDED if name not in {field.name for field in dataclasses.fields(arguments)}]
    if missing:
        raise MixLoraError(
            f"{used().name}, in {used().folder}, trains without LoRA: its {arguments.__name__} has no "
            f"{', '.join(missing)}, on which --mixlora_enable is built; take a LLaVA with these flags"
        )
