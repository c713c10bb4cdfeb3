"""`transformers.integrations.peft`: adapters that a LLaVA loads by itself, with what was trained beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.adapters.trained_beside import load_trained_beside

from .patch import FAULT, Patch


def _with_its_projector(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, peft_model_id, adapter_name, *args, **kwargs)
        if peft_model_id is not None:
            adapter, of_download = adapter_name or "default", kwargs.get("adapter_kwargs") or {}
            others = set(self.peft_config) - {adapter}
            load_trained_beside(self, adapter, str(peft_model_id), others, **{**kwargs, **of_download})
        return result

    return load_adapter


PATCHES = (
    Patch(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        kind=FAULT,
        why="transformers leaves the base's projector in the place of the one that was trained beside a LLaVA's "
        "adapter",
        replace=_with_its_projector,
        parameters=("peft_model_id", "adapter_name"),
    ),
)
