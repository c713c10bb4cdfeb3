"""`transformers.dynamic_module_utils`: Python files that a model's configuration names, and that are never run here.

LLaVA is code of its own, so no model of it needs any, and adapters and bases come from strangers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_mixlora.errors import MixLoraError

from .patch import FAULT, Patch

MODULE = "transformers.dynamic_module_utils"


def _refuse_code(original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MixLoraError(
            "a configuration names Python code of its own (auto_map), which is never run; expected a model of which "
            "LLaVA or transformers has the code"
        )

    return refuse


PATCHES = (
    Patch(
        f"{MODULE}:TIME_OUT_REMOTE_CODE",
        kind=FAULT,
        why="it asks on the terminal whether to run a stranger's code, and runs it when y is typed",
        replace=lambda _: 0,
    ),
    Patch(
        f"{MODULE}:_raise_timeout_error",
        kind=FAULT,
        why="what it says instead of asking advises to run the code",
        replace=_refuse_code,
    ),
    Patch(
        f"{MODULE}:get_class_in_module",
        kind=FAULT,
        why="upstream loads MPT with trust_remote_code=True, whatever lies in its folder",
        replace=_refuse_code,
    ),
)
