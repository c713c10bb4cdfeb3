"""`peft.peft_model`: adapters of a LLaVA that are loaded with what was trained beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.adapters.trained_beside import check_weights_are_there, load_trained_beside

from .patch import FAULT, Patch


def _with_its_projector(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        check_weights_are_there(str(model_id), kwargs.get("subfolder"))
        result = original(self, model_id, adapter_name, *args, **kwargs)
        others = set(self.peft_config) - {adapter_name}
        load_trained_beside(self, adapter_name, str(model_id), others, **kwargs)
        return result

    return load_adapter


PATCHES = (
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        kind=FAULT,
        why="PEFT, and AutoPeftModelForCausalLM with it, leaves the base's projector in the place of the one that was "
        "trained beside a LLaVA's adapter; for weights that a folder lacks it asks the hub, by the folder's name",
        replace=_with_its_projector,
        parameters=("model_id", "adapter_name"),
    ),
)
