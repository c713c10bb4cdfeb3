"""A linear layer with MixLoRA adapters around it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..errors import MixLoraError
from .added_update import added
from .config import MixLoraConfig
from .forward_passes import scope_of_layer
from .joint_work import Run, Share
from .layer_merging import MergeableLayer
from .layer_settings import LayerSettings
from .lora_only import OfLoraLayers
from .mixture import (
    Route,
    coefficients_of,
    conditional_scores,
    conditional_scores_by_table,
    conditional_table,
    core,
    full_core,
    full_precision,
    gates,
    pooled_input,
    promoted,
    route_at_random,
    route_by_input,
)
from .offloading import bring_back
from .registration import BaseTunerLayer
from .router_loss import weighted_term
from .routing_scope import RoutingScope
from .segments import Segments
from .task_subsets import task_subsets
from .training_statistics import Statistics

Observer = Callable[["MixLoraLayer", str, Tensor, Tensor, Tensor, Tensor | None], None]
"""Sees a layer's forward pass: layer, adapter, x [B, S, d_in], z = x Aᵀ [B, S, E], cores [B, E, E], attended [B, S]."""


class _Routed(NamedTuple):
    """What an adapter does with x: x as instances [B, S, d_in] in the dtype that it computes in, and their cores.

    `cores` [B, E, E], or [G, E, E] of the `segments` of the rows; with `pairing="same"` gates [B or G, E]. `share`:
    what they were made of, and with which other layers; None where they are held.
    """

    adapter: str
    sequence: Tensor
    cores: Tensor
    segments: Segments | None = None
    share: Share | None = None


class MixLoraLayer(MergeableLayer, OfLoraLayers, nn.Module, BaseTunerLayer):
    """Any linear layer plus, for each active adapter, the conditional update Δy = ((x Aᵀ) C) B.

    The base layer is only ever called, so how it stores its weight (float, 4-bit, 8-bit, ...) does not matter.
    Parameters by adapter name: `mixlora_A` [E, d_in], `mixlora_B` [E, d_out], `mixlora_router_A` and
    `mixlora_router_B` [E, d_in] (not with `routing="random"`; `pairing="same"` has no router B; with
    `router_input="words"` of the width of the model's word vectors), `mixlora_cfs` [r, E, d_in] (only with `"ifs_cfs"`;
    [r, E, E] with `cfs="table"`).
    Buffer by adapter name: `mixlora_stats_usage` int64 [2, E], how many training instances chose each factor of pool A
    and of pool B. `mixlora_stats_moments` [4, E, E], what a static stand-in for the update is made from, summed over
    what was seen in training: see [`moments`](MergeableLayer.moments). Every process sums its own, and
    `shared_statistics` those of all.

    Inputs are [B, S, d_in]; further middle dimensions count as positions. An input [rows, d_in] is all positions or all
    instances of the forward pass that it belongs to; outside of any it is taken as rows instances of one position each,
    and [d_in] as one instance.

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
        "mixlora_task_subsets",
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
        self.mixlora_task_subsets = BufferDict(persistent=False)
        self.settings: dict[str, LayerSettings] = {}
        self.r: dict[str, int] = {}
        self.num_factors: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._cfs_tables: dict[str, tuple[Any, Tensor]] = {}  # of inference, with what they were made from
        self.last_routes: dict[str, Route | None] = {}  # None, or compiled graphs would not outlast the first route
        self.observer: Observer | None = None
        self.identity = uuid.uuid4().hex  # of its routes in a cache; copies share it, as they share the weights
        self.is_expert = False  # whether it gets a mixture's choice of tokens
        self._unmerged_weight: list[nn.Parameter] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, settings)

    def update_layer(
        self, adapter_name: str, config: MixLoraConfig, settings: LayerSettings, device: torch.device | None = None
    ) -> None:
        """Add an adapter, or replace the one of this name; on the device of the base layer, unless one is given."""
        E, d_in, d_out = settings.num_factors, self.in_features, self.out_features
        self.settings[adapter_name] = settings
        self.r[adapter_name], self.num_factors[adapter_name] = settings.r, E
        self.scaling[adapter_name] = settings.scaling
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.mixlora_dropout[adapter_name] = dropout
        self.last_routes[adapter_name] = None
        self.mixlora_A[adapter_name] = _uniform(E, d_in)
        self.mixlora_B[adapter_name] = (
            nn.Parameter(torch.zeros(E, d_out)) if config.init_weights else _uniform(E, d_out)
        )
        # Whole numbers, which no cast of the model to another float type touches.
        self.mixlora_stats_usage[adapter_name] = torch.zeros(2, E, dtype=torch.int64)
        self.mixlora_stats_moments[adapter_name] = torch.zeros(4, E, E, dtype=torch.int64)
        self._cfs_tables.pop(adapter_name, None)
        if settings.routing != "random":
            width = d_in if settings.router_width is None else settings.router_width
            routers = [self.mixlora_router_A, *([self.mixlora_router_B] if settings.pairing == "rank" else [])]
            for router in routers:
                router[adapter_name] = (
                    nn.Parameter(torch.zeros(E, width)) if config.router_init == "zero" else _uniform(E, width)
                )
        if settings.routing == "ifs_cfs":
            self.mixlora_cfs[adapter_name] = _uniform(settings.r, E, E if settings.cfs == "table" else d_in)
        if settings.task_loss_weight != 0:
            subsets = task_subsets(settings.tasks, E, settings.r)
            self.mixlora_task_subsets[adapter_name] = subsets.to(self.mixlora_A[adapter_name].device)
        if not settings.straight_through:
            # No gradient ever reaches them: frozen, they neither decay nor stall distributed data parallelism.
            self.frozen_peft_weight_names[adapter_name] = ("mixlora_router_A", "mixlora_router_B", "mixlora_cfs")
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
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
        if disabled:
            return self.base_layer(x, *args, **kwargs)
        scope, again = scope_of_layer()
        given = x
        if scope is not None:
            scope = scope.sequence_of(x, self.identity)
            x = scope.by_instance(x)
        if adapter_names is None and scope is not None:
            adapter_names = scope.adapter_names
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if merged:
            return self.base_layer(given, *args, **kwargs)
        # Autograd runs what was called last first. Routing comes before the base layer, so that gradients of routers
        # and W_AB, which stay, are made when the large ones on the way to x are gone: it decides the peak of memory.
        active = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        factors_A = self.mixlora_A
        routed = [self._routed(x, adapter, adapter_names, scope, again) for adapter in active if adapter in factors_A]
        base_layer = self.base_layer
        result = base_layer(given, *args, **kwargs)
        for each in routed:
            z, coefficients = self._coefficients(each, given, factors_A)
            if each.share is not None and each.share.term is not None:
                coefficients = scope.router_loss.tie(coefficients, each.share.term, note=not again)
            result = added(result, coefficients, self.mixlora_B[each.adapter], base_layer)
            if self.training or self.observer is not None:
                self._observe(each.sequence, z, each.cores, each.segments, each.adapter, scope, again)
        return result

    def _coefficients(self, routed: _Routed, given: Tensor, factors_A: nn.ParameterDict) -> tuple[Tensor, Tensor]:
        """z = x Aᵀ and z C, [B, S, E] each, of what the layer is `given`."""
        adapter, sequence, cores, segments, share = routed
        dropout = self.mixlora_dropout[adapter]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if share is not None:
            if not drops and len(share.run.layers) > 1:
                made = share.run.coefficients(share.place, given, sequence, segments)
                if made is not None:
                    return made
            cores = share.run.cores_of(share.place)
        z = F.linear(dropout(sequence) if drops else sequence, factors_A[adapter])
        return z, coefficients_of(z, cores, segments)

    def _observe(
        self,
        x: Tensor,
        z: Tensor,
        cores: Tensor,
        segments: Segments | None,
        adapter: str,
        scope: RoutingScope | None,
        again: bool,
    ) -> None:
        """Note a training step's forward pass for the statistics, and show any forward pass to the observer."""
        trains = self.training and scope is not None and scope.trains
        if not trains and self.observer is None:
            return
        attended = scope.attended if scope is not None and scope.covers(x) else None
        attended = None if attended is None else attended.to(x.device)
        if self.training and not isinstance(self.mixlora_dropout[adapter], nn.Identity):
            with torch.no_grad():  # by a checkpoint too, which may count on the same operations in the same order
                z = F.linear(x, self.mixlora_A[adapter])
        if trains and not again:
            total = Statistics(self.mixlora_stats_usage[adapter], self.mixlora_stats_moments[adapter])
            scope.statistics.note(total, z, cores, attended, segments)
        if self.observer is not None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if segments is not None:
                    x, z, attended = segments.split(x), segments.split(z), segments.attended(attended)
                self.observer(self, adapter, x, z, full_core(cores), attended)

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
        self, x: Tensor, adapter: str, adapter_names: Sequence[str] | None, scope: RoutingScope | None, again: bool
    ) -> _Routed:
        factors_A = self.mixlora_A[adapter]
        if factors_A.is_meta:
            bring_back(self)
        sequence, dtype = x, factors_A.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            sequence = x.to(dtype)
        if x.ndim != 3:
            sequence = self._as_instances(sequence, scope)
        routed = self._core(sequence, adapter, scope, x, again)
        if adapter_names is not None:
            # All instances are routed, since what a scope knows and holds is per instance of the whole batch.
            named = torch.tensor([name == adapter for name in adapter_names], device=x.device)
            named = named if routed.segments is None else named[routed.segments.row]
            cores = routed.cores * named.view(-1, *[1] * (routed.cores.ndim - 1))
            routed = routed._replace(cores=cores, share=None)
        return routed

    def _as_instances(self, x: Tensor, scope: RoutingScope | None) -> Tensor:
        """x of another number of dimensions as [B, S, d_in].

        Raises:
            MixLoraError: x [rows, d_in] within a model's forward pass, and to which instance a row belongs is unknown.
        """
        if x.ndim == 1:
            return x.view(1, 1, -1)
        if x.ndim > 3:
            return x.flatten(1, -2)
        if scope is None or scope.shape is None:
            return x.unsqueeze(1)
        B, S = scope.shape
        if not self.is_expert:
            if len(x) == B * S:
                return x.view(B, S, -1)
            if len(x) == B:
                return x.unsqueeze(1)
        raise MixLoraError(
            f"an adapted layer ({self.in_features} to {self.out_features} features) gets {len(x)} rows in a forward "
            f"pass of {B} x {S} positions: to which instance a row belongs, and so its route, is not known; leave such "
            "layers (experts of a mixture, a tower that flattens its images) out with exclude_modules"
        )

    def _core(self, x: Tensor, adapter: str, scope: RoutingScope | None, given: Tensor, again: bool) -> _Routed:
        """The cores of x [B, S, d_in], which was made from what the layer was `given`."""
        settings, key = self.settings[adapter], (self.identity, adapter)
        holds = scope is not None and settings.decode_routing == "prefill" and scope.shares_instances(x)
        if self.training and scope is not None and (known := scope.known_share(self, adapter, x)) is not None:
            return self._taken(adapter, x, *known, scope if holds else None)
        segments = None
        one_more = holds and scope.goes_on and x.shape[1] == 1  # token of a generation, which is no segment
        if not one_more and scope is not None and scope.covers(x):
            segments = scope.segments(settings.router_scope, settings.count_padding)
            segments = None if segments is None else segments.on(x.device)
        if holds and (held := scope.held_core(key, x.shape[0], segments)) is not None:
            return _Routed(adapter, x, held, segments if segments is not None and len(held) == len(segments) else None)
        if scope is not None and scope.trains and not again and settings.router_scope in ("prompt", "instruction"):
            scope.require_prompt(settings.unknown_prompt)
        if scope is not None and settings.router_scope == "instruction" and scope.covers(x):
            scope.require_text("router_scope='instruction'")
        with full_precision(x):
            dtype = promoted(self.mixlora_A[adapter].dtype, x.dtype)
            pooled = self._pooled(x, adapter, scope, given, segments)
            index = self._index_of_tasks(x, adapter, scope, segments)
            share = None
            if pooled is not None and self.training and scope is not None and scope.makes_shares:
                share = scope.share_of(self, adapter, x, pooled, index, dtype, segments)
            if share is None:
                route = self._route(x, pooled, index, adapter, segments)
                term = None
                if self.training and scope is not None and scope.trains and len(route.index_A):
                    term = weighted_term(route, settings)
                cores = self.core_of(route, adapter, dtype)
                share = Share(route.detach(), cores.detach(), Run([self], adapter, cores), 0, term)
        return self._taken(adapter, x, share, segments, scope if holds else None)

    def _taken(
        self, adapter: str, x: Tensor, share: Share, segments: Segments | None, holder: RoutingScope | None
    ) -> _Routed:
        """Go by a share, and let the `holder`, if there is one, keep its cores for the rest of a generation."""
        self.last_routes[adapter] = share.route
        if holder is not None:
            holder.hold((self.identity, adapter), share.cores)
        return _Routed(adapter, x, share.cores, segments, share)

    def _route(
        self, x: Tensor, pooled: Tensor | None, index: Tensor | None, adapter: str, segments: Segments | None
    ) -> Route:
        """By what the routers see, `pooled`, or the factors of tasks, `index`; without either at random."""
        settings = self.settings[adapter]
        if pooled is None:
            instances = len(x) if segments is None else len(segments)
            if self.training:
                return route_at_random(instances, settings.num_factors, settings.r, x.device, pairing=settings.pairing)
            fixed = torch.Generator().manual_seed(settings.seed)
            route = route_at_random(1, settings.num_factors, settings.r, x.device, fixed, settings.pairing)
            return Route(route.index_A.expand(instances, -1), route.index_B.expand(instances, -1), None, None)
        route = self.route_of(pooled, adapter)
        return route if index is None else Route(index, index, route.score_A, route.score_B)

    def _pooled(
        self, x: Tensor, adapter: str, scope: RoutingScope | None, given: Tensor, segments: Segments | None
    ) -> Tensor | None:
        """What the routers see, [B, d_in] or, with words, [B, d_model], of segments [G, ...]; None without routers."""
        settings = self.settings[adapter]
        if settings.routing == "random":
            return None
        if not settings.straight_through:
            x = x.detach()
        if settings.router_width is not None:
            return self._pooled_words(x, adapter, scope, segments)
        if scope is None:
            return pooled_input(x, None)
        return scope.pooled(x, settings.router_scope, settings.count_padding, given)

    def _index_of_tasks(
        self, x: Tensor, adapter: str, scope: RoutingScope | None, segments: Segments | None
    ) -> Tensor | None:
        """The factors of the instances' tasks in a training step with `task_loss_weight`, int64 [B or G, r]."""
        settings = self.settings[adapter]
        if settings.task_loss_weight == 0 or not self.training or scope is None or not scope.trains:
            return None
        subsets = self.mixlora_task_subsets[adapter].to(x.device)
        return subsets[scope.require_tasks(len(x), settings.tasks, segments).to(x.device)]

    def routers(self, adapter: str) -> tuple[nn.ParameterDict, ...]:
        """Where the routers of an adapter are: of both pools, or the only one."""
        return (self.mixlora_router_A, self.mixlora_router_B)[: 1 if self.settings[adapter].pairing == "same" else 2]

    def route_of(self, pooled: Tensor, adapter: str) -> Route:
        """What the layer's routers choose by what they see, `pooled` [B, d_in] or, with words, [B, d_model]."""
        settings = self.settings[adapter]
        return route_by_input(
            pooled,
            self.mixlora_router_A[adapter],
            self.mixlora_router_B[adapter] if settings.pairing == "rank" else None,
            settings.r,
            partial(self._conditional_scores, adapter) if settings.routing == "ifs_cfs" else None,
        )

    def core_of(self, route: Route, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """The cores [B, E, E] of a route or, with `pairing="same"`, its gates [B, E]."""
        settings = self.settings[adapter]
        make = gates if settings.pairing == "same" else core
        dtype = self.mixlora_A[adapter].dtype if dtype is None else dtype
        return make(route, settings.num_factors, settings.scaling, settings.straight_through, dtype)

    def _pooled_words(self, x: Tensor, adapter: str, scope: RoutingScope | None, segments: Segments | None) -> Tensor:
        """u of the instances of x, or of their segments, [B or G, d_model].

        Raises:
            MixLoraError: the forward pass that the layer runs in knows no words, or not of these instances.
        """
        words = None if scope is None else scope.words(adapter, self.settings[adapter].router_scope)
        if words is None or len(words) != (len(x) if segments is None else len(segments)):
            raise MixLoraError(
                f"router_input='words': an adapted layer ({self.in_features} to {self.out_features} features) gets "
                f"{len(x)} instances, but not the words of their instructions; call the model that was adapted, and "
                "leave layers of other inputs (a vision tower's) out with exclude_modules"
            )
        scope.require_text("router_input='words'")
        return words.to(x.device)

    def _conditional_scores(self, adapter: str, index_A: Tensor) -> Tensor:
        """p_AB [B, E]; without gradients by the table, which then depends on nothing that changes from call to call."""
        settings, factors_A, cfs = self.settings[adapter], self.mixlora_A[adapter], self.mixlora_cfs[adapter]
        if not settings.straight_through:
            factors_A = factors_A.detach()
        if settings.cfs == "table":
            return conditional_scores_by_table(cfs, index_A, settings.cfs_temperature)
        if self.training or torch.is_grad_enabled():
            return conditional_scores(factors_A, cfs, index_A, settings.cfs_product, settings.cfs_temperature)
        table = self._cfs_table(adapter, factors_A, cfs, settings.cfs_product)
        return conditional_scores_by_table(table, index_A, settings.cfs_temperature)

    def _cfs_table(self, adapter: str, factors_A: Tensor, cfs: Tensor, product: str) -> Tensor:
        versioned = not (torch.compiler.is_compiling() or factors_A.is_inference() or cfs.is_inference())
        if not versioned or hasattr(cfs, "ds_id"):  # DeepSpeed gathers weights anew, which counts as no change
            return conditional_table(factors_A, cfs, product)
        made_from = tuple((id(each), each.data_ptr(), each.device, each._version) for each in (factors_A, cfs))
        known = self._cfs_tables.get(adapter)
        if known is None or known[0] != made_from:
            known = made_from, conditional_table(factors_A, cfs, product)
            self._cfs_tables[adapter] = known
        return known[1]

    def train(self, mode: bool = True) -> MixLoraLayer:
        """As any module's; what inference has made of weights that are about to change is forgotten."""
        self._cfs_tables.clear()
        return super().train(mode)

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
    raise MixLoraError(
        f"cannot adapt {type(base_layer).__name__}: expected a linear layer with in_features and out_features; "
        "narrow target_modules or add it to exclude_modules"
    )


def _uniform(*shape: int) -> nn.Parameter:
    """Uniform in ±1/√fan_in over the last dimension, as LoRA's A; does not rely on torch's default init,

    which `llava.utils.disable_torch_init` turns off.
    """
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
