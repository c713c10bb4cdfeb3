"""Makes PEFT know the type MIXLORA, without editing PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

if TYPE_CHECKING:
    from .config import MixLoraConfig
    from .model import MixLoraModel


def _extended_peft_type() -> PeftType:
    # Python refuses to subclass an enum that has members, and PEFT keys every table by this one.
    if "MIXLORA" not in PeftType.__members__:
        extend_enum(PeftType, "MIXLORA", "MIXLORA")
    return PeftType["MIXLORA"]


MIXLORA: PeftType = _extended_peft_type()
"""The member that this plugin adds to `peft.utils.PeftType`."""


def register(config_cls: type[MixLoraConfig], model_cls: type[MixLoraModel]) -> None:
    """Enter the method into PEFT's tables (`peft.utils.register_peft_method`); does nothing the second time."""
    if MIXLORA not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="mixlora", config_cls=config_cls, model_cls=model_cls)
