"""What PEFT's base classes do since 0.21, for the PEFT versions before it.

There no method is asked for its tensors when adapters are saved and loaded (`patches.peft_save_and_load` asks it), and
whole numbers are moved as if they were weights. What PEFT before 0.18 leaves to every method beside that is in
[`oldest_peft`](llava_mixlora.method.oldest_peft).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners import tuners_utils
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


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

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, but for what is frozen; PEFT has such a switch since 0.18."""
        super().set_requires_grad(adapter_names, requires_grad)
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._freeze(adapter, self.frozen_peft_weight_names.get(adapter, ()))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self.frozen_peft_weight_names.pop(adapter_name, None)


class BaseTuner(tuners_utils.BaseTuner):
    """A tuner that knows the names of its tensors, and whose forward pass is the model's, hooks included."""

    tuner_layer_cls: type[BaseTunerLayer]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, its hooks included."""
        return self.model(*args, **kwargs)

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
