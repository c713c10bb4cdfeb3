"""How a layer takes its adapters into its base weight, and gives them back."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import MixLoraError
from .layer_settings import LayerSettings
from .merged_weight import merged_weight, set_weight, weight_of
from .static_core import Moments, low_rank_pair, lstsq_core, squared_error, squared_norm

LOSSY = 0.65
"""A static update that misses more than this share of the dynamic one over the training data, ‖error‖ / ‖update‖, is
said to lose. It is a poor witness: on the playground's tasks 0.74 went with 72 points of accuracy (routes by words),
0.50 with one (the paper's form), but 0.42 with 15 (routes by the instruction's hidden states)."""


class MergeableLayer:
    """The part of [`MixLoraLayer`] that merges: it needs the layer's pools, settings and sums of training.

    No static weight equals an update that depends on the input; [`static_core`] says what is put in its place.
    """

    mixlora_A: nn.ParameterDict
    mixlora_B: nn.ParameterDict
    mixlora_stats_moments: nn.Module
    settings: dict[str, LayerSettings]
    merged_adapters: list[str]
    # In a list, because an attribute of its own would become the layer's parameter.
    _unmerged_weight: list[nn.Parameter]

    def moments(self, adapter: str) -> Moments:
        """What training has summed for [`static_core`], in float64; views, to which every forward pass adds at its end.

        The buffer holds the bits of float64 numbers as whole numbers, which no cast of the model to another float type
        touches. Padding is left out, dropout too; a checkpoint's second forward pass does not count again.
        """
        return Moments(*self.mixlora_stats_moments[adapter].view(torch.float64))

    def static_update(self, adapter: str) -> tuple[Tensor, Tensor]:
        """What merging puts in the place of an adapter's update, as a LoRA: down [E, d_in] and up [d_out, E].

        It is [`lstsq_core`] of what training has summed.

        Raises:
            MixLoraError: training has summed nothing, and the adapter has an effect.
        """
        moments, settings = self.moments(adapter), self.settings[adapter]
        factors_A, factors_B = self.mixlora_A[adapter].detach(), self.mixlora_B[adapter].detach()
        if moments.core.any():
            return low_rank_pair(factors_A, factors_B, lstsq_core(moments, settings.r * settings.scaling))
        if factors_B.any():
            raise MixLoraError(
                f"adapter {adapter!r} cannot be merged: its update differs from input to input, and it holds no "
                "statistics of training to make a static one from; merge with `llava-mixlora merge --calibration DATA`"
            )
        return low_rank_pair(factors_A, factors_B, torch.zeros_like(moments.core))

    def static_error(self, adapter: str) -> float | None:
        """‖zCB − zMB‖ / ‖zCB‖ of [`static_update`](MergeableLayer.static_update) over the training data.

        None where training has summed nothing, or the update was zero.
        """
        moments, settings = self.moments(adapter), self.settings[adapter]
        factors_B = self.mixlora_B[adapter].detach()
        norm = squared_norm(moments, factors_B)
        if not norm > 0:
            return None
        core = lstsq_core(moments, settings.r * settings.scaling)
        return float((squared_error(moments, factors_B, core) / norm).sqrt())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight that merging adds for an adapter, [d_out, d_in] in float32 at least.

        Raises:
            MixLoraError: as [`static_update`](MergeableLayer.static_update).
        """
        down, up = self.static_update(adapter)
        return up @ down

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the static updates of adapters to the base weight; all of them or none.

        The parameter that the base layer had is kept aside until [`unmerge`](MergeableLayer.unmerge) puts it back, so a
        merged layer that is not unloaded takes the memory of two weights.

        Args:
            safe_merge: refuse to merge into a weight that is not finite everywhere.
            adapter_names: the active adapters when None.

        Raises:
            MixLoraError: as [`static_update`](MergeableLayer.static_update), or the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mixlora_A]
        if not names:
            return
        base_layer = self.get_base_layer()
        merged = merged_weight(base_layer, sum(self.get_delta_weight(name) for name in names))
        if safe_merge and merged.is_floating_point() and not merged.isfinite().all():
            raise MixLoraError(
                f"adapters {names} make a weight that is not finite: one is broken, or too large for the base's dtype"
            )
        if not self.merged:
            self._unmerged_weight = [weight_of(base_layer)]
        set_weight(base_layer, merged)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Give the base layer back the weight that it had, to the bit."""
        if not self.merged:
            warnings.warn("no adapter is merged: there is nothing to take back", stacklevel=2)
            return
        base_layer = self.get_base_layer()
        current, before = weight_of(base_layer), self._unmerged_weight.pop()
        if before.device != current.device or (before.is_floating_point() and before.dtype != current.dtype):
            before = nn.Parameter(before.to(current.device, current.dtype), requires_grad=before.requires_grad)
        set_weight(base_layer, before)
        self.merged_adapters.clear()
