"""A linear layer with MixLoRA adapters around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..errors import MixLoraError
from .balance_loss import load_balance
from .config import MixLoraConfig
from .layer_merging import MergeableLayer
from .layer_settings import LayerSettings
from .mixture import Route, core, pooled_input, route_at_random, route_by_input, update_of
from .registration import BaseTunerLayer
from .routing_scope import RoutingScope, current_scope, is_recomputing
from .training_statistics import Statistics

Observer = Callable[["MixLoraLayer", str, Tensor, Tensor, Tensor, Tensor | None], None]
"""Sees a layer's forward pass: layer, adapter, x [B, S, d_in], z = x Aᵀ [B, S, E], cores [B, E, E], attended [B, S]."""


class MixLoraLayer(MergeableLayer, nn.Module, BaseTunerLayer):
    """Any linear layer plus, for each active adapter, the conditional update Δy = ((x Aᵀ) C) B.

    The base layer is only ever called, so how it stores its weight (float, 4-bit, 8-bit, ...) does not matter.
    Parameters by adapter name: `mixlora_A` [E, d_in], `mixlora_B` [E, d_out], `mixlora_router_A` and
    `mixlora_router_B` [E, d_in] (not with `routing="random"`), `mixlora_cfs` [r, E, d_in] (only with `"ifs_cfs"`).
    Buffer by adapter name: `mixlora_stats_usage` int64 [2, E], how many training instances chose each factor of pool A
    and of pool B. `mixlora_stats_moments` [4, E, E], what a static stand-in for the update is made from, summed over
    what was seen in training: see [`moments`](MergeableLayer.moments). Every process sums its own, and
    `shared_statistics` those of all.

    Inputs are [B, S, d_in]; further middle dimensions count as positions. An input [rows, d_in] is taken as rows
    instances of one position each, and [d_in] as one instance.

    Raises:
        TypeError: the module to wrap does not tell its `in_features` and `out_features`.
    """

    adapter_layer_names = ("mixlora_A", "mixlora_B", "mixlora_router_A", "mixlora_router_B", "mixlora_cfs")
    other_param_names = (
        "r",
        "num_factors",
        "scaling",
        "settings",
        "mixlora_dropout",
        "last_routes",
        "mixlora_stats_usage",
        "mixlora_stats_moments",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MixLoraConfig, settings: LayerSettings):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(self.get_base_layer())
        self.mixlora_A = nn.ParameterDict()
        self.mixlora_B = nn.ParameterDict()
        self.mixlora_router_A = nn.ParameterDict()
        self.mixlora_router_B = nn.ParameterDict()
        self.mixlora_cfs = nn.ParameterDict()
        self.mixlora_dropout = nn.ModuleDict()
        self.mixlora_stats_usage = BufferDict(persistent=True)
        self.mixlora_stats_moments = BufferDict(persistent=True)
        self.settings: dict[str, LayerSettings] = {}
        self.r: dict[str, int] = {}
        self.num_factors: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.last_routes: dict[str, Route] = {}
        self.observer: Observer | None = None
        self._unmerged_weight: list[nn.Parameter] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, settings)

    def update_layer(self, adapter_name: str, config: MixLoraConfig, settings: LayerSettings) -> None:
        """Add an adapter, or replace the one of this name."""
        E, d_in, d_out = settings.num_factors, self.in_features, self.out_features
        self.settings[adapter_name] = settings
        self.r[adapter_name], self.num_factors[adapter_name] = settings.r, E
        self.scaling[adapter_name] = settings.scaling
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.mixlora_dropout[adapter_name] = dropout
        self.mixlora_A[adapter_name] = _uniform(E, d_in)
        self.mixlora_B[adapter_name] = (
            nn.Parameter(torch.zeros(E, d_out)) if config.init_weights else _uniform(E, d_out)
        )
        # Whole numbers, which no cast of the model to another float type touches.
        self.mixlora_stats_usage[adapter_name] = torch.zeros(2, E, dtype=torch.int64)
        self.mixlora_stats_moments[adapter_name] = torch.zeros(4, E, E, dtype=torch.int64)
        if settings.routing != "random":
            self.mixlora_router_A[adapter_name] = _uniform(E, d_in)
            self.mixlora_router_B[adapter_name] = _uniform(E, d_in)
        if settings.routing == "ifs_cfs":
            self.mixlora_cfs[adapter_name] = _uniform(settings.r, E, d_in)
        if not settings.straight_through:
            # No gradient ever reaches them: frozen, they neither decay nor stall distributed data parallelism.
            self.frozen_peft_weight_names[adapter_name] = ("mixlora_router_A", "mixlora_router_B", "mixlora_cfs")
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of every active adapter, in the base output's dtype.

        `adapter_names` names one adapter for each instance, which then takes the place of the active ones; a name that
        this layer does not have (`"__base__"`) leaves the instance to the base layer.

        Raises:
            ValueError: the names are not as many as the instances, or an adapter is merged.
        """
        disabled, merged = self.disable_adapters, self.merged
        if disabled and merged:
            self.unmerge()
        if adapter_names is not None and not disabled:
            self._check_adapter_names(x, adapter_names)
        if disabled or merged:
            return self.base_layer(x, *args, **kwargs)
        scope, factors_A = current_scope(), self.mixlora_A
        # Autograd runs what was called last first. Routing comes before the base layer, so that gradients of routers
        # and W_AB, which stay, are made when the large ones on the way to x are gone: it decides the peak of memory.
        active = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        routed = [
            (adapter, factors_A[adapter], *self._routed(x, adapter, factors_A[adapter], adapter_names, scope))
            for adapter in active
            if adapter in factors_A
        ]
        result = self.base_layer(x, *args, **kwargs)
        for adapter, A, sequence, cores in routed:
            dropout = self.mixlora_dropout[adapter]
            z = F.linear(sequence if isinstance(dropout, nn.Identity) else dropout(sequence), A)
            update = update_of(z, self.mixlora_B[adapter], cores)
            if update.dtype != result.dtype:
                update = update.to(result.dtype)
            result = result + (update if update.ndim == result.ndim else update.view(result.shape))
            if self.training or self.observer is not None:
                self._observe(sequence, z, cores, adapter, scope)
        return result

    def _observe(self, x: Tensor, z: Tensor, cores: Tensor, adapter: str, scope: RoutingScope | None) -> None:
        """Note a training step's forward pass for the statistics, and show any forward pass to the observer."""
        trains = self.training and scope is not None and scope.trains and not is_recomputing()
        if not trains and self.observer is None:
            return
        attended = scope.attended if scope is not None and scope.covers(x) else None
        if self.training and not isinstance(self.mixlora_dropout[adapter], nn.Identity):
            with torch.no_grad():
                z = F.linear(x, self.mixlora_A[adapter])
        if trains:
            total = Statistics(self.mixlora_stats_usage[adapter], self.mixlora_stats_moments[adapter])
            scope.statistics.note(total, z, cores, attended)
        if self.observer is not None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self.observer(self, adapter, x, z, cores, attended)

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        # Worded so that what matches the messages of PEFT's LoRA matches these.
        if len(x) != len(adapter_names):
            raise MixLoraError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)}; give one name per instance"
            )
        if self.merged:
            raise MixLoraError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _routed(
        self, x: Tensor, adapter: str, A: Tensor, adapter_names: Sequence[str] | None, scope: RoutingScope | None
    ) -> tuple[Tensor, Tensor]:
        """x as instances [B, S, d_in] in the dtype that the adapter computes in, and their cores [B, E, E]."""
        sequence = x
        if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
            sequence = x.to(A.dtype)
        if x.ndim != 3:
            sequence = _as_instances(sequence)
        cores = self._core(sequence, adapter, scope, x)
        if adapter_names is not None:
            # All instances are routed, since what a scope knows and holds is per instance of the whole batch.
            cores = cores * torch.tensor([name == adapter for name in adapter_names], device=x.device).view(-1, 1, 1)
        return sequence, cores

    def _core(self, x: Tensor, adapter: str, scope: RoutingScope | None, given: Tensor) -> Tensor:
        settings = self.settings[adapter]
        holds = scope is not None and settings.decode_routing == "prefill" and scope.shares_instances(x)
        if holds and (held := scope.held_core(self, adapter, x.shape[0])) is not None:
            return held
        with _full_precision(x):
            route = self._route(x, adapter, scope, given)
            self.last_routes[adapter] = route.detach()
            dtype = torch.promote_types(self.mixlora_A[adapter].dtype, x.dtype)
            result = core(route, settings.num_factors, settings.scaling, settings.straight_through, dtype)
            if self.training and settings.balance_loss_weight != 0 and scope is not None and scope.trains:
                result = self._balanced(result, route, adapter, scope)
        if holds:
            scope.hold(self, adapter, result)
        return result

    def _balanced(self, core: Tensor, route: Route, adapter: str, scope: RoutingScope) -> Tensor:
        """Let the balance term join the loss through the core; returns the core, unchanged."""
        if len(core) == 0:
            return core
        pools = (route.score_A, route.index_A), (route.score_B, route.index_B)
        weight = self.settings[adapter].balance_loss_weight
        term = weight / len(pools) * sum(load_balance(score, index) for score, index in pools)
        return scope.balance.tie(core, term, note=not is_recomputing())

    def _route(self, x: Tensor, adapter: str, scope: RoutingScope | None, given: Tensor) -> Route:
        """The route of x [B, S, d_in], which was made from what the layer was `given`."""
        settings = self.settings[adapter]
        if settings.routing == "random":
            if self.training:
                return route_at_random(len(x), settings.num_factors, settings.r, x.device)
            fixed = torch.Generator().manual_seed(settings.seed)
            route = route_at_random(1, settings.num_factors, settings.r, x.device, fixed)
            return Route(route.index_A.expand(len(x), -1), route.index_B.expand(len(x), -1), None, None)
        factors_A = self.mixlora_A[adapter]
        if not settings.straight_through:
            x, factors_A = x.detach(), factors_A.detach()
        if scope is None:
            pooled = pooled_input(x, None)
        else:
            pooled = scope.pooled(x, settings.router_scope, settings.count_padding, given)
        return route_by_input(
            pooled,
            self.mixlora_router_A[adapter],
            self.mixlora_router_B[adapter],
            settings.r,
            factors_A,
            self.mixlora_cfs[adapter] if settings.routing == "ifs_cfs" else None,
            settings.cfs_product,
        )

    def __repr__(self) -> str:
        return "mixlora." + super().__repr__()


class MixLoraLinear(MixLoraLayer):
    """What a model holds. PEFT's `target_modules="all-linear"` finds it by the "Linear" in the name."""


def _features(base_layer: nn.Module) -> tuple[int, int]:
    if hasattr(base_layer, "in_features") and hasattr(base_layer, "out_features"):
        return base_layer.in_features, base_layer.out_features
    weight = getattr(base_layer, "weight", None)
    if type(base_layer).__name__ == "Conv1D" and weight is not None:  # transformers' transposed linear, as in GPT-2
        d_in, d_out = getattr(weight, "ds_shape", weight.shape)
        return d_in, d_out
    raise TypeError(
        f"cannot adapt {type(base_layer).__name__}: expected a linear layer with in_features and out_features; "
        "narrow target_modules or add it to exclude_modules"
    )


def _uniform(*shape: int) -> nn.Parameter:
    """Uniform in ±1/√fan_in over the last dimension, as LoRA's A; does not rely on torch's default init,

    which `llava.utils.disable_torch_init` turns off.
    """
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of x; entering its context costs more than asking for it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _as_instances(x: Tensor) -> Tensor:
    if x.ndim == 1:
        return x.view(1, 1, -1)
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
