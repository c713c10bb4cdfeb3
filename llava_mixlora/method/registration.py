"""Makes PEFT know the type MIXLORA, without editing PEFT, and finds the base classes that fit the installed version.

The one place that knows that PEFT versions differ. What an older one lacks is in `older_peft` (before 0.21) and
`oldest_peft` (before 0.18), and is chosen by what the installed one has, not by its number.
"""

from __future__ import annotations

from importlib.metadata import version
from types import ModuleType

import peft
import torch
from aenum import extend_enum
from packaging.version import Version
from peft.tuners import tuners_utils
from peft.utils import PeftType, constants

if Version(torch.__version__) < Version("2.4"):
    # LLaVA's metadata pins 2.1, which cannot tell whether autocast is on for a device.
    raise ImportError(f"torch {torch.__version__}: expected 2.4 or newer; run: pip install 'torch>=2.4'")
if Version(version("peft")) < Version("0.13"):
    raise ImportError(f"peft {version('peft')}: expected 0.13 or newer; run: pip install 'peft>=0.13.2'")

ASKS_METHODS = hasattr(tuners_utils.BaseTuner, "_get_adapter_state_dict")
"""Whether this PEFT asks a method for its tensors when it saves and loads an adapter, as it does since 0.21."""

if ASKS_METHODS:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
elif hasattr(tuners_utils.BaseTuner, "delete_adapter"):  # and the rest of the bookkeeping, since 0.18
    from .older_peft import BaseTuner, BaseTunerLayer
else:
    from .older_peft import BaseTunerLayer
    from .oldest_peft import BaseTuner
if hasattr(peft.PeftConfig, "__post_init__"):  # since 0.14
    from peft import PeftConfig
else:
    from .oldest_peft import PeftConfig

__all__ = ["ASKS_METHODS", "MIXLORA", "BaseTuner", "BaseTunerLayer", "PeftConfig", "register", "withdraw"]


def _extended_peft_type() -> PeftType:
    # Python refuses to subclass an enum that has members, and PEFT keys every table by this one.
    if "MIXLORA" not in PeftType.__members__:
        extend_enum(PeftType, "MIXLORA", "MIXLORA")
    return PeftType["MIXLORA"]


MIXLORA: PeftType = _extended_peft_type()
"""The member that this plugin adds to `peft.utils.PeftType`."""


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter the method into PEFT's tables (`peft.utils.register_peft_method`), all of them or, where one fails, none.

    Does nothing the second time. Where PEFT does not ask methods for their tensors (`ASKS_METHODS`) it still saves and
    loads none but the types that it knows: see `patches.peft_save_and_load`.
    """
    if MIXLORA in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING:
        return
    try:
        if hasattr(peft.utils, "register_peft_method"):
            peft.utils.register_peft_method(name="mixlora", config_cls=config_cls, model_cls=model_cls)
        else:
            entries = {"CONFIG": config_cls, "TUNER": model_cls, "MODEL": model_cls, "PREFIX": model_cls.prefix}
            for module in _modules_with_tables():
                for kind, entry in entries.items():
                    getattr(module, f"PEFT_TYPE_TO_{kind}_MAPPING", {})[MIXLORA] = entry
    except Exception:
        withdraw()
        raise


def withdraw() -> None:
    """Take the method out of PEFT's tables, so that no model is made whose adapter could not be saved."""
    for module in _modules_with_tables():
        for name, table in vars(module).items():
            if name.startswith("PEFT_TYPE_TO_") and isinstance(table, dict):
                table.pop(MIXLORA, None)


def _modules_with_tables() -> tuple[ModuleType, ...]:
    return peft.mapping, peft.peft_model, constants
