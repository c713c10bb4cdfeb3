"""What PEFT's base tuner does since 0.18, and its configuration since 0.14, for the versions before.

LLaVA's own pin of transformers works with PEFT 0.13 at most. There each tuner brings its methods for switching,
freezing, deleting and unloading adapters. This one behaves as PEFT 0.21's, as far as MixLoRA relies on it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners import tuners_utils
from peft.utils import ModulesToSaveWrapper, _get_submodules
from torch import nn
from tqdm import tqdm

from . import older_peft
from .older_peft import BaseTunerLayer


@dataclass
class PeftConfig(peft.PeftConfig):
    """A configuration that checks what every method's has.

    Raises:
        ValueError: there is no such task type.
    """

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(peft.TaskType):
            raise ValueError(f"task_type={self.task_type!r}: expected one of {', '.join(peft.TaskType)}, or None")


class BaseTuner(older_peft.BaseTuner):
    """A tuner of which a method states no more than its layers' class, its default targets and how to make a layer."""

    target_module_mapping: Mapping[str, list[str]]

    def __getattr__(self, name: str) -> Any:
        """What the tuner does not have, its model may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:
            known = self.target_module_mapping.get(model_config.get("model_type"))
            if known is None:
                raise ValueError("no layers are known for this model; give their names as target_modules")
            peft_config.target_modules = set(known)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        # What PEFT, since 0.14, knows modules by that were left out on purpose.
        left_out = getattr(tuners_utils, "_ExcludedModule", bool)()
        excluded = peft_config.exclude_modules
        if isinstance(excluded, str):
            if re.fullmatch(excluded, key):
                return left_out
        elif excluded and any(key == name or key.endswith(f".{name}") for name in excluded):
            return left_out
        if any(re.match(rf"(.*\.)?{module}(\..*)?$", key) for module in peft_config.modules_to_save or ()):
            return left_out
        return tuners_utils.check_target_module_exists(peft_config, key)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if sum(other.bias != "none" for other in self.peft_config.values()) > 1:
            raise ValueError(
                f"bias={config.bias!r}: another adapter trains the biases already, which are the base's, so only one "
                "may; give bias='none'"
            )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        of_adapters = {
            id(parameter)
            for layer in self._tuner_layers()
            for kind in layer.adapter_layer_names
            for parameter in getattr(layer, kind).parameters()
        }
        saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        of_adapters.update(id(parameter) for module in saved for parameter in module.parameters())
        for parameter in model.parameters():
            if id(parameter) not in of_adapters:
                parameter.requires_grad = False
        for adapter in self.active_adapters:
            bias = self.peft_config[adapter].bias
            if bias == "all":
                biases = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"]
            else:
                biases = [] if bias == "none" else [layer.bias for layer in self._tuner_layers()]
            for parameter in biases:
                if parameter is not None:
                    parameter.requires_grad = True

    def _tuner_layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _switchable(self) -> list[BaseTunerLayer | ModulesToSaveWrapper]:
        kinds = (tuners_utils.BaseTunerLayer, ModulesToSaveWrapper)
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def enable_adapter_layers(self) -> None:
        """Let the active adapters take part in the forward pass."""
        for module in self._switchable():
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Leave the base model alone in the forward pass, but for biases that were trained."""
        for adapter in self.active_adapters:
            if (bias := self.peft_config[adapter].bias) != "none":
                warnings.warn(
                    f"the adapter is disabled, but the biases that it has trained (bias={bias!r}) stay in the base",
                    stacklevel=2,
                )
        for module in self._switchable():
            module.enable_adapters(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; they train unless `inference_mode`."""
        for layer in self._tuner_layers():
            if layer.merged:
                warnings.warn("Adapter cannot be set when the model is merged: it is unmerged first.", stacklevel=2)
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; another becomes the active one where it was.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        remaining = None
        for layer in self._tuner_layers():
            layer.delete_adapter(adapter_name)
            remaining = layer.active_adapters[:] if remaining is None else remaining
        for wrapper in self.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                if hasattr(wrapper, "delete_adapter"):  # since PEFT 0.16
                    wrapper.delete_adapter(adapter_name, remaining)
                else:
                    del wrapper.modules_to_save[adapter_name]
                    getattr(wrapper, "_adapters", set()).discard(adapter_name)
        self.active_adapter = remaining or []

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, the active ones by default, into their layers."""
        self._check_merge_allowed()
        for layer in self._tuner_layers():
            with tuners_utils.onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._unloading_checks(adapter_names)
        if merge:
            self._check_merge_allowed()
        kinds = (self.tuner_layer_cls, ModulesToSaveWrapper)
        names = [name for name, module in self.model.named_modules() if isinstance(module, kinds)]
        for name in tqdm(names, desc=f"Unloading {'and merging ' if merge else ''}model", disable=not progressbar):
            parent, target, target_name = _get_submodules(self.model, name)
            with tuners_utils.onload_layer(target):
                if isinstance(target, ModulesToSaveWrapper):
                    trained = target.modules_to_save
                    self._replace_module(parent, target_name, trained[target.active_adapter], target)
                    continue
                if merge:
                    target.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                self._replace_module(parent, target_name, target.get_base_layer(), target)
        del self.model.peft_config
        return self.model

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters, the active ones by default, merged into it."""
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model without any adapter."""
        return self._unload_and_optionally_merge(merge=False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
