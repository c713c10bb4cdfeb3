"""What PEFT's base classes do since 0.21, for the PEFT versions that leave it to every method.

LLaVA's own pin of transformers works with PEFT 0.13 at most. There each tuner brings its methods for switching,
freezing, deleting and unloading adapters, and none is asked when they are saved and loaded (for which there is
`patches.peft_save_and_load`). These classes behave as PEFT 0.21's, as far as MixLoRA relies on it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners import tuners_utils
from peft.tuners._buffer_dict import BufferDict
from peft.utils import ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class PeftConfig(peft.PeftConfig):
    """A configuration that checks what every method's has.

    Raises:
        ValueError: there is no such task type.
    """

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(peft.TaskType):
            known = ", ".join(peft.TaskType)
            raise ValueError(f"Invalid task type: '{self.task_type}'. Must be one of the following: {known}.")


class BaseTunerLayer(tuners_utils.BaseTunerLayer):
    """A layer whose activated adapter may stay frozen, in all or some of its parameters."""

    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; they train unless `inference_mode`."""
        super().set_adapter(adapter_names)
        for adapter in self.active_adapters:
            self._freeze(adapter, self.adapter_layer_names if inference_mode else ())
            self._freeze(adapter, self.frozen_peft_weight_names.get(adapter, ()))

    def _freeze(self, adapter: str, kinds: Sequence[str]) -> None:
        for kind in kinds:
            if adapter in getattr(self, kind):
                getattr(self, kind)[adapter].requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the device and dtype of the base layer; whole numbers keep their dtype."""
        kinds = [getattr(self, kind) for kind in (*self.adapter_layer_names, *self.other_param_names)]
        if device is not None:  # PEFT 0.13 fails there, over a variable that it has not set
            dtype = self.get_base_layer().weight.dtype
            for kind in kinds:
                if not isinstance(kind, (nn.ParameterDict, BufferDict)) or adapter_name not in kind:
                    continue
                value = kind[adapter_name]
                if not value.is_meta:
                    both_are_floats = dtype.is_floating_point and value.is_floating_point()
                    kind[adapter_name] = value.to(device, dtype if both_are_floats else value.dtype)
            return
        whole = {
            id(kind): kind[adapter_name] for kind in kinds if isinstance(kind, BufferDict) and adapter_name in kind
        }
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for kind in kinds:
            if id(kind) in whole and not whole[id(kind)].is_floating_point():
                kind[adapter_name] = whole[id(kind)].to(kind[adapter_name].device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self.frozen_peft_weight_names.pop(adapter_name, None)


class BaseTuner(tuners_utils.BaseTuner):
    """A tuner of which a method states no more than its layers' class, its default targets and how to make a layer."""

    tuner_layer_cls: type[BaseTunerLayer]
    target_module_mapping: Mapping[str, list[str]]

    def __getattr__(self, name: str) -> Any:
        """What the tuner does not have, its model may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, its hooks included."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:
            known = self.target_module_mapping.get(model_config.get("model_type"))
            if known is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            peft_config.target_modules = set(known)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        excluded = peft_config.exclude_modules
        if isinstance(excluded, str):
            if re.fullmatch(excluded, key):
                return False
        elif excluded and any(key == name or key.endswith(f".{name}") for name in excluded):
            return False
        if any(re.match(rf"(.*\.)?{module}(\..*)?$", key) for module in peft_config.modules_to_save or ()):
            return False
        return tuners_utils.check_target_module_exists(peft_config, key)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if sum(other.bias != "none" for other in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias to "
                "'none' for all adapters."
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
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
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
                del wrapper.modules_to_save[adapter_name]
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

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors of one adapter, by their names in the model."""
        selected = {name: state_dict[name] for name in cls._tensors_of(model, adapter_name) if name in state_dict}
        if config.bias == "all":
            biases = [name for name in state_dict if name.split(".")[-1] == "bias"]
        else:
            layers = cls._named_layers(model) if config.bias != "none" else {}
            biases = [f"{name}.base_layer.bias" for name in layers if f"{name}.base_layer.bias" in state_dict]
        return {**selected, **{name: state_dict[name] for name in biases}}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A saved adapter's tensors, by their names in the model."""
        names = {}
        for name in cls._tensors_of(model, adapter_name):
            saved = name.removesuffix(f".{adapter_name}")
            # A PeftModel, which writes the file, puts this before the names of a model that was adapted without one.
            names[saved] = names[f"base_model.model.{saved}"] = name
        return {names.get(name, name): tensor for name, tensor in state_dict.items()}

    @classmethod
    def _named_layers(cls, model: nn.Module) -> dict[str, BaseTunerLayer]:
        return {name: module for name, module in model.named_modules() if isinstance(module, cls.tuner_layer_cls)}

    @classmethod
    def _tensors_of(cls, model: nn.Module, adapter_name: str) -> list[str]:
        return [
            f"{name}.{kind}.{adapter_name}".lstrip(".")
            for name, layer in cls._named_layers(model).items()
            for kind in (*layer.adapter_layer_names, *layer.other_param_names)
            if isinstance(getattr(layer, kind), nn.Module) and adapter_name in dict(getattr(layer, kind).items())
        ]
