"""What a transformers model leaves outside of itself when it is made, and lacks when a pickle brings it back."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, modeling_utils


def know_outputs_to_record(model: nn.Module) -> None:
    """Let the transformers models in `model` return hidden states and attentions in a process that has made none.

    Since 4.57, each class enters what it can record into a table of the process when one of its models is made.
    """
    table = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
    if table is None:
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            dict.__setitem__(table, str(type(module)), module._can_record_outputs)
