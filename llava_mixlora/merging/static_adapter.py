"""A saved MixLoRA adapter turned into a static one: a LoRA of rank E for every adapted layer, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapters.adapter_folder import weights_of
from ..adapters.reading import check_is_of_upstream, read_mixlora
from ..errors import MixLoraError
from ..method.config import MixLoraConfig
from ..method.static_core import Moments, low_rank_pair, lstsq_core, mean_core, squared_error, squared_norm
from ..method.stored_tensors import allowing_incomplete
from ..method.tensor_names import PEFT_PREFIX

StaticUpdates = dict[str, tuple[Tensor, Tensor]]
"""By layer name: down [E, d_in] and up [d_out, E] of the static update x downᵀ upᵀ."""
FROM_STATISTICS = {"mean": mean_core, "lstsq": lstsq_core}


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved adapter: the pools A [E, d_in] and B [E, d_out], and what training has summed, or None."""

    factors_A: Tensor
    factors_B: Tensor
    moments: Moments | None
    entries: float  # the sum of a core's entries

    def static_update(self, method: str) -> tuple[Tensor, Tensor]:
        """down and up by `"mean"` or `"lstsq"`, from the saved statistics, which have to be there."""
        core = FROM_STATISTICS[method](self.moments, self.entries)
        return low_rank_pair(self.factors_A, self.factors_B, core)

    def relative_error(self, method: str) -> float:
        """‖zCB − zMB‖ / ‖zCB‖ over the training data; 0 for an update that is zero there."""
        core = FROM_STATISTICS[method](self.moments, self.entries)
        return relative(squared_error(self.moments, self.factors_B, core), squared_norm(self.moments, self.factors_B))


def relative(error: Tensor, norm: Tensor) -> float:
    """The square root of two sums of squares' ratio; 0 where both are 0."""
    return float((error / norm).sqrt()) if norm > 0 else 0.0


class SavedAdapter(Mapping[str, SavedLayer]):
    """The layers of the MIXLORA adapter in a folder, by the name that the base model knows them by.

    `allow_incomplete`: of an adapter that lacks tensors, the layers that have both pools.

    Raises:
        MixLoraError: there is no such adapter, it is incomplete, or its files are damaged.
    """

    def __init__(self, folder: str | Path, allow_incomplete: bool = False) -> None:
        self.folder = Path(folder)
        with allowing_incomplete(allow_incomplete):
            adapter = read_mixlora(folder)
        check_is_of_upstream(adapter)
        self.config: MixLoraConfig = adapter.config
        self.beside = adapter.beside
        self._tensors = safe_open(str(weights_of(folder)), framework="pt")
        self._names = list(self._tensors.keys())
        layers = [name.removesuffix(".mixlora_A") for name in self._names if name.endswith(".mixlora_A")]
        self._layers = [layer for layer in layers if f"{layer}.mixlora_B" in self._names]

    def __getitem__(self, layer: str) -> SavedLayer:
        name = PEFT_PREFIX + layer
        factors_A, factors_B = (self._tensors.get_tensor(f"{name}.mixlora_{pool}") for pool in "AB")
        sums = f"{name}.mixlora_stats_moments"
        moments = Moments(*self._tensors.get_tensor(sums)) if sums in self._names else None
        r, alpha = self.config.rank_of(layer), self.config.alpha_of(layer)
        has_moments = moments is not None and bool(moments.core.any())
        return SavedLayer(factors_A, factors_B, moments if has_moments else None, entries=r * (alpha / r))

    def __iter__(self) -> Iterator[str]:
        return (layer.removeprefix(PEFT_PREFIX) for layer in self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def further_tensors(self) -> dict[str, Tensor]:
        """What was trained beside the pools and is saved with them (biases, modules to save), by its stored name."""
        names = [name for name in self._names if ".mixlora_" not in name]
        return {name: self._tensors.get_tensor(name) for name in names}

    def static_updates(self, method: str) -> StaticUpdates:
        """The static updates of all layers from the statistics of training, `method` being `"mean"` or `"lstsq"`.

        Raises:
            MixLoraError: a layer has no statistics but an effect, or `method` needs calibration data.
        """
        if method not in FROM_STATISTICS:
            raise MixLoraError(
                f"--method {method} needs data: an adapter keeps statistics for {' and '.join(FROM_STATISTICS)} only; "
                "add --calibration DATA"
            )
        updates = {}
        for name, layer in self.items():
            if layer.moments is not None:
                updates[name] = layer.static_update(method)
            elif layer.factors_B.any():
                raise MixLoraError(
                    f"{self.folder} holds no statistics of training for {name} (it was converted, or saved by an older "
                    "version): there is nothing to merge by; add --calibration DATA --image-folder DIR"
                )
            else:
                E = len(layer.factors_B)
                updates[name] = low_rank_pair(layer.factors_A, layer.factors_B, torch.zeros(E, E))
        return updates

    def relative_errors(self) -> dict[str, dict[str, float]]:
        """By layer and method, the relative output error over the training data; layers without statistics left out."""
        layers = {name: layer for name, layer in self.items() if layer.moments is not None}
        return {name: {m: layer.relative_error(m) for m in FROM_STATISTICS} for name, layer in layers.items()}
