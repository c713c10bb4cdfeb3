"""`transformers.models.auto`: types of models that transformers has given to its own since a LLaVA took them.

LLaVA of 2023 registers its configuration as "llava", which transformers' own LLaVA is called now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.llava_package import used

from .patch import COMPATIBILITY, Patch


def _its_own_first(original: Callable[..., None]) -> staticmethod:
    @functools.wraps(original)
    def register(model_type: str, config: type, exist_ok: bool = False) -> None:
        original(model_type, config, exist_ok=exist_ok or _is_of_the_llava(config))

    return staticmethod(register)


def _its_models_first(original: Callable[..., None]) -> classmethod:
    @functools.wraps(original.__func__)
    def register(cls: type, config_class: type, *args: Any, exist_ok: bool = False) -> None:
        original.__func__(cls, config_class, *args, exist_ok=exist_ok or _is_of_the_llava(config_class))

    return classmethod(register)


def _is_of_the_llava(config: Any) -> bool:
    return getattr(config, "__module__", "").partition(".")[0] == used().name


WHY = "transformers refuses a type that it has itself, as the 'llava' of LLaVAs of 2023, and the import ends there"
PATCHES = (
    Patch(
        "transformers.models.auto.configuration_auto:AutoConfig.register",
        kind=COMPATIBILITY,
        why=WHY,
        replace=_its_own_first,
        parameters=("model_type", "config", "exist_ok"),
    ),
    Patch(
        "transformers.models.auto.auto_factory:_BaseAutoModelClass.register",
        kind=COMPATIBILITY,
        why=WHY,
        replace=_its_models_first,
        parameters=("config_class", "exist_ok"),
    ),
)
