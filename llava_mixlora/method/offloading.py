"""Adapters of layers whose weights accelerate keeps on the CPU or on disk while they are not used.

accelerate's hooks fetch what a module owns when that module is called. A layer's adapters belong to dictionaries, which
nobody calls, and are small beside the weight of the base: they stay on the device where the layer runs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft.tuners._buffer_dict import BufferDict
from torch import nn


def device_of_adapter(base_layer: nn.Module, model: nn.Module) -> torch.device | None:
    """Where a new adapter of an offloaded base layer of `model` belongs; None where its weight tells it."""
    hook = _offloading_hook(base_layer)
    if hook is not None:
        return torch.device(hook.execution_device)
    # PEFT takes the hooks away for the time in which it loads an adapter, which leaves what is on disk without values.
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    return torch.device("cpu") if on_disk and any(weight.is_meta for weight in base_layer.parameters()) else None


def bring_back(layer: nn.Module) -> None:
    """Take the adapters of a layer that was offloaded with them to the device where the layer runs, to stay there."""
    for owner in layer.children():
        hook = _offloading_hook(owner)
        if hook is None or not isinstance(owner, (nn.ParameterDict, BufferDict)):
            continue
        _enter_under_its_name(owner, hook.weights_map)
        with torch.inference_mode(False):
            hook.pre_forward(owner)
        add_hook_to_module(owner, AlignDevicesHook(hook.execution_device))


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)


def _enter_under_its_name(owner: nn.Module, weights: Any) -> None:
    """Let the index of what is on disk find `layer.mixlora_A.default`, which PEFT calls `layer.default.mixlora_A`.

    That is `PeftModel._update_offload`, which puts an adapter's name before the last part of a tensor's.
    """
    index = getattr(getattr(weights, "dataset", None), "index", {})
    layer, _, kind = getattr(weights, "prefix", "").rstrip(".").rpartition(".")
    for adapter in owner:
        if f"{layer}.{adapter}.{kind}" in index:
            index.setdefault(f"{layer}.{kind}.{adapter}", index[f"{layer}.{adapter}.{kind}"])
