"""Makes PEFT know the type MIXLORA, without editing PEFT, and finds the base classes that fit the installed version."""

from __future__ import annotations

from importlib.metadata import version

import peft
import torch
from aenum import extend_enum
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

if Version(torch.__version__) < Version("2.4"):
    # LLaVA's metadata pins 2.1, which cannot tell whether autocast is on for a device.
    raise ImportError(f"torch {torch.__version__}: expected 2.4 or newer; run: pip install 'torch>=2.4'")

installed = Version(version("peft"))
KNOWS_NO_OTHER_TYPE = installed < Version("0.14")
"""Whether this PEFT saves and loads the adapters of no type but its own."""

if installed >= Version("0.21"):
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
elif KNOWS_NO_OTHER_TYPE:
    from .older_peft import BaseTuner, BaseTunerLayer, PeftConfig
else:
    raise ImportError(
        f"peft {installed}: expected 0.21 or newer, or 0.13.2 beside transformers 4.37; run: pip install 'peft>=0.21.2'"
    )

__all__ = ["KNOWS_NO_OTHER_TYPE", "MIXLORA", "BaseTuner", "BaseTunerLayer", "PeftConfig", "register", "withdraw"]


def _extended_peft_type() -> PeftType:
    # Python refuses to subclass an enum that has members, and PEFT keys every table by this one.
    if "MIXLORA" not in PeftType.__members__:
        extend_enum(PeftType, "MIXLORA", "MIXLORA")
    return PeftType["MIXLORA"]


MIXLORA: PeftType = _extended_peft_type()
"""The member that this plugin adds to `peft.utils.PeftType`."""


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter the method into PEFT's tables (`peft.utils.register_peft_method`), all of them or, where one fails, none.

    Does nothing the second time. PEFT 0.13 then still saves and loads none but the types that it knows: see
    `patches.peft_save_and_load`.
    """
    if MIXLORA in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    try:
        if installed >= Version("0.21"):
            from peft.utils import register_peft_method

            register_peft_method(name="mixlora", config_cls=config_cls, model_cls=model_cls)
        else:
            peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MIXLORA] = config_cls
            PEFT_TYPE_TO_TUNER_MAPPING[MIXLORA] = peft.peft_model.PEFT_TYPE_TO_MODEL_MAPPING[MIXLORA] = model_cls
    except Exception:
        withdraw()
        raise


def withdraw() -> None:
    """Take the method out of PEFT's tables, so that no model is made whose adapter could not be saved."""
    for module in (peft.mapping, peft.peft_model):
        for name, table in vars(module).items():
            if name.startswith("PEFT_TYPE_TO_") and isinstance(table, dict):
                table.pop(MIXLORA, None)
