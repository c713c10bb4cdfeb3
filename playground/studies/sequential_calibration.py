"""Static updates made one layer after the other, each on what the static ones before it make of the data.

A candidate that `merge_study` measures and `llava-mixlora merge` does not offer. Layers that read the same input
(query, key and value; gate and up) are made at once: four passes over the data for a decoder layer, 128 for a LLaVA-7B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mixlora.inference.samples import Batch
from llava_mixlora.merging.calibration import observed
from llava_mixlora.merging.static_adapter import StaticUpdates
from llava_mixlora.method.layer import MixLoraLayer
from llava_mixlora.method.model import ADAPTER, adapted_layers

TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
RIDGE = 1e-4  # share of the mean squared input


def sequential(model: nn.Module, read: Callable[[str], Iterator[Batch]]) -> StaticUpdates:
    """The regression of every layer's dynamic update on its input, both in a model whose earlier layers are static.

    Args:
        model: a PeftModel around a LLaVA with a MixLoRA adapter, in evaluation mode.
        read: as in `merging.calibration.calibrate`.
    """
    layers = adapted_layers(model)
    found: StaticUpdates = {}
    with ExitStack() as made:
        for names in _groups(layers):
            sums = {name: _Regression() for name in names}
            with observed(layers, {name: of_layer.add for name, of_layer in sums.items()}), torch.no_grad():
                for batch in read(f"After {len(found)} of {len(layers)} layers"):
                    model(**batch)
            for name, of_layer in sums.items():
                found[name] = of_layer.solve(layers[name])
                made.callback(_make_static(layers[name], *found[name]))
    return found


def _groups(layers: dict[str, MixLoraLayer]) -> Iterator[list[str]]:
    decoders = dict.fromkeys(name.rsplit(".", 2)[0] for name in layers)
    for decoder in sorted(decoders, key=lambda name: int(name.rpartition(".")[2])):
        for kinds in TOGETHER:
            if names := [f"{decoder}.{kind}" for kind in kinds if f"{decoder}.{kind}" in layers]:
                yield names


def _make_static(layer: MixLoraLayer, down: Tensor, up: Tensor) -> Callable[[], None]:
    """Put a static update in the place of the layer's; returns what puts the dynamic one back."""

    def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], down), up)

    hook = layer.register_forward_hook(add)
    layer.enable_adapters(False)

    def undo() -> None:
        hook.remove()
        layer.enable_adapters(True)

    return undo


class _Regression:
    """Sums of one layer for min ‖(zC − xW) B‖², whose solution is of rank E whatever B is."""

    def __init__(self) -> None:
        self.second = self.cross = torch.zeros(())

    def add(
        self, layer: MixLoraLayer, adapter: str, x: Tensor, z: Tensor, cores: Tensor, attended: Tensor | None
    ) -> None:
        counts = torch.ones(x.shape[:2], dtype=torch.bool) if attended is None else attended
        seen, wanted = x[counts].double(), torch.bmm(z, cores)[counts].double()
        self.second = self.second + seen.t() @ seen
        self.cross = self.cross + seen.t() @ wanted

    def solve(self, layer: MixLoraLayer) -> tuple[Tensor, Tensor]:
        ridge = RIDGE * self.second.diagonal().mean() * torch.eye(len(self.second), dtype=self.second.dtype)
        weight = torch.linalg.solve(self.second + ridge, self.cross)
        return weight.t().float().contiguous(), layer.mixlora_B[ADAPTER].detach().t().contiguous()
