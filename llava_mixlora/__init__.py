"""MixLoRA (Shen et al., ACL 2024) as a PEFT method, and as a plugin for LLaVA.

Importing this package registers the PEFT type `MIXLORA` and, where the installed PEFT or transformers save and load an
adapter without asking its method, makes them ask; LLaVA is left alone. What LLaVA needs is applied by
`llava_mixlora.patches.apply()`, which `llava-mixlora run` calls.
"""

from . import interruption

if interruption.is_program():
    interruption.end_at_once()  # before the seconds that the imports below take

import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .errors import MixLoraError

if TYPE_CHECKING:
    from .training.routing_callback import RoutingCallback
    from .training.shared_statistics import share_statistics
    from .training.task_labels import TaskLabels

__all__ = [
    "MixLoraConfig",
    "MixLoraError",
    "MixLoraLayer",
    "MixLoraModel",
    "RoutingCallback",
    "TaskLabels",
    "known_prompt",
    "share_statistics",
]
__version__ = version("llava-mixlora")

_ON_DEMAND = {
    "RoutingCallback": "routing_callback",
    "TaskLabels": "task_labels",
    "share_statistics": "shared_statistics",
}
"""Names of the room `training`, of which most need transformers' Trainer, and the modules that have them."""

import_error: Exception | None = None
"""Why the method cannot be used: `llava-mixlora doctor`, which tells what is missing, has to start then too."""

try:
    # Older accelerate imports DeepSpeed, which logs to the standard output, where programs read `doctor --json`.
    with redirect_stdout(sys.stderr):
        from .method.config import MixLoraConfig
        from .method.forward_passes import known_prompt
        from .method.layer import MixLoraLayer
        from .method.model import MixLoraModel
        from .method.registration import register, withdraw

    register(MixLoraConfig, MixLoraModel)
    from .patches import peft_save_and_load, transformers_peft_statistics

    _patches = (*peft_save_and_load.PATCHES, *transformers_peft_statistics.PATCHES)
    try:
        for _patch in _patches:
            _patch.apply()
    except Exception:
        withdraw()
        for _patch in reversed(_patches):
            _patch.undo()
        raise
except Exception as error:  # what an installation in pieces raises can be anything
    import_error = error
    for _name in ("MixLoraConfig", "MixLoraLayer", "MixLoraModel", "known_prompt"):
        globals().pop(_name, None)  # what was imported before the failure could train, but not save


def __getattr__(name: str) -> Any:
    if import_error is not None and name in __all__:
        reason = str(import_error) or type(import_error).__name__
        raise ImportError(f"{__name__}.{name}: {reason}; `llava-mixlora doctor` tells more") from import_error
    if name in _ON_DEMAND:
        return getattr(import_module(f".training.{_ON_DEMAND[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
