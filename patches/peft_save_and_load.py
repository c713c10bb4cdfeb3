"""`peft.utils.save_and_load` and `peft.config` of PEFT before 0.21, which ask no method for its tensors.

Registration applies these, not [`apply`](patches.apply): they belong to the PEFT method, with LLaVA or without.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from peft.utils import PeftType
from torch import Tensor

from llava_mixlora.method.registration import MIXLORA

from .patch import COMPATIBILITY, Patch

OLDER_PEFT = {"peft": "<0.21"}
PLACES = {
    **dict.fromkeys(("peft.utils.save_and_load", "peft.utils", "peft", "peft.peft_model"), OLDER_PEFT),
    "peft.functional": {"peft": ">=0.18,<0.21"},
}
"""The modules into which PEFT imports the two functions by name, and the versions that do."""


class _OfAnotherType:
    """A model with a MIXLORA adapter of which PEFT's functions shall think that it is of a type they know."""

    def __init__(self, model: Any, adapter_name: str, peft_type: PeftType) -> None:
        self._model = model
        config = copy.copy(model.peft_config[adapter_name])
        config.peft_type = peft_type
        self.peft_config = {**model.peft_config, adapter_name: config}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _tuner_class() -> Any:
    from llava_mixlora.method.model import MixLoraModel

    return MixLoraModel


def _save_adapter(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model, adapter = given.arguments["model"], given.arguments["adapter_name"]
        model = getattr(model, "_orig_mod", model) if given.arguments["unwrap_compiled"] else model
        config = model.peft_config[adapter]
        if config.peft_type != MIXLORA:
            return original(*args, **kwargs)
        if given.arguments["state_dict"] is None:
            given.arguments["state_dict"] = model.state_dict()
        # Of this type the model has no tensors, so only what any type saves is found: modules_to_save and embeddings.
        given.arguments["model"] = _OfAnotherType(model, adapter, PeftType.LN_TUNING)
        saved_beside = original(*given.args, **given.kwargs)
        adapters = _tuner_class()._get_adapter_state_dict(model, config, adapter, given.arguments["state_dict"], [])
        return {**saved_beside, **{name.removesuffix(f".{adapter}"): tensor for name, tensor in adapters.items()}}

    return get_peft_model_state_dict


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type != MIXLORA:
            return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        tensors = _tuner_class()._remap_adapter_state_dict_for_load(model, config, adapter_name, peft_model_state_dict)
        # This type leaves the names of these tensors as they are, and puts modules_to_save where they belong.
        stand_in = _OfAnotherType(model, adapter_name, PeftType.LN_TUNING)
        return original(stand_in, tensors, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _ignore_newer_fields(original: Any) -> classmethod:
    def from_peft_type(cls: type, **kwargs: Any) -> Any:
        from llava_mixlora.method.config import MixLoraConfig

        if kwargs.get("peft_type") == MIXLORA:
            known = inspect.signature(MixLoraConfig).parameters
            newer = sorted(set(kwargs) - set(known) - {"peft_version"})
            if newer:
                warnings.warn(f"fields of a newer PEFT or llava-mixlora are ignored: {', '.join(newer)}", stacklevel=3)
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return original.__func__(cls, **kwargs)

    return classmethod(from_peft_type)


PATCHES = (
    *(
        Patch(
            f"{module}:get_peft_model_state_dict",
            kind=COMPATIBILITY,
            why="this PEFT saves only the adapters of types that it knows",
            replace=_save_adapter,
            requires=versions,
        )
        for module, versions in PLACES.items()
    ),
    *(
        Patch(
            f"{module}:set_peft_model_state_dict",
            kind=COMPATIBILITY,
            why="this PEFT loads only the adapters of types that it knows",
            replace=_load_adapter,
            requires=versions,
        )
        for module, versions in PLACES.items()
    ),
    Patch(
        "peft.config:PeftConfigMixin.from_peft_type",
        kind=COMPATIBILITY,
        why="this PEFT refuses a configuration with fields that a newer PEFT has written, or forgets the others",
        replace=_ignore_newer_fields,
        requires=OLDER_PEFT,
    ),
)
