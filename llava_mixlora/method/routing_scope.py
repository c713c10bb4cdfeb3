"""Which positions the routers of one forward pass average, and which routes a generation keeps.

An adapted layer sees only its own input x [B, S, d]. Which of the S positions are padding, prompt or answer is known
where the model is called, so that knowledge travels beside x as the thread's current [`RoutingScope`]:

- a forward pre-hook on the adapted model opens the scope from `attention_mask` and `labels`, a post-hook closes it;
- code that changes the sequence on the way in (LLaVA puts image features into it) calls [`refine`];
- gradient checkpointing runs layers again during backward, possibly in another thread and after other forwards:
  [`follow_checkpoints`] makes it run them under the scope of the forward that they belong to, known as a recomputation.

Scopes live in a `threading.local` (a `ContextVar` would break the graph of `torch.compile`), so threads that use one
model at the same time do not see each other's.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache

from ..errors import MixLoraError
from .balance_loss import BalanceLoss
from .mixture import pooled_input
from .training_statistics import TrainingStatistics

IGNORE_INDEX = -100
"""Label of an unsupervised position (`llava.constants.IGNORE_INDEX`, and PyTorch's cross entropy)."""

HeldCores = dict[tuple[nn.Module, str], Tensor]
"""Cores [B, E, E] that a generation keeps, by layer and adapter name."""


class RoutingScope:
    """The positions of one forward pass.

    Args:
        shape: (B, S) of the sequence, or None when the model's input is not a sequence.
        attended: bool [B, S], False at padding; None when every position is attended.
        prompt: bool [B, S], True before the first supervised label; None when there are no labels.
        held: cores that earlier forward passes of the same generation computed; they are used again.
    """

    def __init__(
        self,
        shape: tuple[int, int] | None = None,
        attended: Tensor | None = None,
        prompt: Tensor | None = None,
        held: HeldCores | None = None,
    ) -> None:
        # Apart from `computed`, so that a checkpoint that runs the forward again computes what the forward computed.
        self.held: HeldCores = {} if held is None else held
        self.computed: HeldCores = {}
        self.trains = False  # whether the forward pass is a step of training, to be counted and balanced
        self.balance = BalanceLoss()
        self.statistics = TrainingStatistics()
        self.model: nn.Module | None = None
        self.outer: RoutingScope | None = None
        self.set_positions(shape, attended, prompt)

    def set_positions(self, shape: tuple[int, int] | None, attended: Tensor | None, prompt: Tensor | None) -> None:
        """Replace what the scope knows of the sequence; the arguments are those of the class."""
        self.shape, self.attended, self.prompt = shape, attended, prompt
        self._weights: dict[tuple[str, bool], Tensor | None] = {}
        self._last_pooled: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None

    def covers(self, x: Tensor) -> bool:
        """Whether x [B, S, d] is this scope's sequence (and not, say, the patches inside a vision tower)."""
        return self.shape is not None and x.ndim == 3 and x.shape[:2] == self.shape

    def shares_instances(self, x: Tensor) -> bool:
        """Whether x [B, S', d] holds this scope's instances: all their positions or, in a model's head, the last."""
        return self.shape is not None and x.ndim == 3 and len(x) == self.shape[0]

    def weights(self, router_scope: str, count_padding: bool) -> Tensor | None:
        """Rows [B, S] in float32 that sum to one over the routed positions; None where all positions count alike."""
        key = (router_scope, count_padding)
        if key not in self._weights:
            positions = None if count_padding else self.attended
            if router_scope == "prompt" and self.prompt is not None:
                positions = self.prompt if positions is None else positions & self.prompt
            self._weights[key] = None if positions is None else self._normalised(positions)
        return self._weights[key]

    def pooled(self, x: Tensor, router_scope: str, count_padding: bool, given: Tensor) -> Tensor:
        """h̄ of x [B, S, d_in], [B, d_in], by [`mixture.pooled_input`], over the routed positions where x has them.

        Layers that are `given` the same tensor in a row (q, k and v; gate and up) share one average of it.
        """
        weights = self.weights(router_scope, count_padding) if self.covers(x) else None
        # A compiler finds by itself what is computed twice, and a tensor of inference mode does not count its changes.
        if torch.compiler.is_compiling() or given.is_inference():
            return pooled_input(x, weights)
        key = (router_scope, count_padding, x.dtype, x.requires_grad, torch.is_grad_enabled(), given._version)
        if self._last_pooled is not None:
            of, last_key, pooled = self._last_pooled
            if of() is given and last_key == key:
                return pooled
        pooled = pooled_input(x, weights)
        self._last_pooled = weakref.ref(given), key, pooled
        return pooled

    def _normalised(self, positions: Tensor) -> Tensor:
        # An instance without any routed position (its very first token is supervised) falls back to what is attended,
        # and a row of nothing but padding to the whole row, rather than to a mean of nothing.
        if self.attended is not None:
            positions = torch.where(positions.any(dim=1, keepdim=True), positions, self.attended)
        positions = positions | ~positions.any(dim=1, keepdim=True)
        return positions / positions.sum(dim=1, keepdim=True, dtype=torch.float32)

    def held_core(self, layer: nn.Module, adapter: str, instances: int) -> Tensor | None:
        """The core kept for a layer, [instances, E, E], or None in the first forward of a generation.

        Raises:
            ValueError: the generation was begun with another number of instances.
        """
        core = self.held.get((layer, adapter))
        if core is None or len(core) == instances:
            return core
        if instances % len(core) == 0:  # the cache was repeated to draw several continuations of each prompt
            return core.repeat_interleave(instances // len(core), dim=0)
        raise MixLoraError(
            f"a generation that was begun with {len(core)} instances goes on with {instances}: its routes are held "
            "per instance; keep the batch as it is, or use decode_routing='step'"
        )

    def hold(self, layer: nn.Module, adapter: str, core: Tensor) -> None:
        """Keep a core for the rest of the generation."""
        self.computed[layer, adapter] = core.detach()


class _ThreadState(threading.local):
    scope: RoutingScope | None = None  # of the innermost forward pass that is running
    held: HeldCores | None = None  # of the innermost generation that is running
    recomputing = False  # whether a checkpoint runs a part of a forward pass again


_state = _ThreadState()
_held_by_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""HeldCores by [`_identity`] of the cache."""


def current_scope() -> RoutingScope | None:
    """The scope of the forward pass that this thread is in."""
    return _state.scope


def is_recomputing() -> bool:
    """Whether this thread is in a checkpoint that runs a part of a forward pass for the second time."""
    return _state.recomputing


@contextmanager
def use_scope(scope: RoutingScope | None, recomputing: bool = False) -> Iterator[None]:
    """Run the body as part of the forward pass that `scope` belongs to; `recomputing` when it has run before."""
    outer = _state.scope, _state.recomputing
    _state.scope, _state.recomputing = scope, recomputing
    try:
        yield
    finally:
        _state.scope, _state.recomputing = outer


@contextmanager
def generation() -> Iterator[None]:
    """Run the body as one generation: routes that its first forward computes hold for all its forwards."""
    outer, _state.held = _state.held, {}
    try:
        yield
    finally:
        _state.held = outer


def refine(attention_mask: Tensor | None, labels: Tensor | None, embeddings: Tensor) -> None:
    """Tell the running forward pass what its sequence has become: `embeddings` [B, S, d] with its mask and labels."""
    if (scope := _state.scope) is not None:
        scope.set_positions(*_positions(embeddings.shape[:2], attention_mask, labels))


def attach(model: nn.Module) -> None:
    """Open a scope around every forward pass of `model`; does nothing the second time."""
    if not is_attached(model):
        model.register_forward_pre_hook(_open_scope, with_kwargs=True)
        model.register_forward_hook(_close_scope, with_kwargs=True, always_call=True)


def is_attached(model: nn.Module) -> bool:
    """Whether [`attach`] was called on `model`."""
    return _open_scope in model._forward_pre_hooks.values()


def detach(model: nn.Module) -> None:
    """Undo [`attach`] and [`follow_checkpoints`]."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _open_scope]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for key in [key for key, hook in model._forward_hooks.items() if hook is _close_scope]:
        del model._forward_hooks[key], model._forward_hooks_with_kwargs[key], model._forward_hooks_always_called[key]
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, ScopedCheckpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint


def follow_checkpoints(model: nn.Module) -> None:
    """Make the gradient checkpointing of a transformers model carry the routing scope (reentrant or not).

    transformers keeps the function on every module that checkpoints, as `_gradient_checkpointing_func`.
    """
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, ScopedCheckpoint):
            module._gradient_checkpointing_func = ScopedCheckpoint(checkpoint)


class ScopedCheckpoint:
    """A checkpoint function whose recomputation runs under the scope of the forward pass that called it.

    Args:
        checkpoint: a function like `torch.utils.checkpoint.checkpoint`, called as `checkpoint(function, *args)`.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope, recomputing = _state.scope, _state.recomputing

        def run_in_scope(*inputs: Any, **options: Any) -> Any:
            nonlocal recomputing
            has_run_before, recomputing = recomputing, True
            with use_scope(scope, has_run_before):
                return function(*inputs, **options)

        output = self.checkpoint(run_in_scope, *args, **kwargs)
        if scope is not None:
            scope.statistics.make()  # now, or they would keep alive what the checkpoint frees
        return output


def _open_scope(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trains = model.training and torch.is_grad_enabled()
    if trains:
        follow_checkpoints(model)
    inputs = _named_inputs(model, args, kwargs)
    sequence = inputs.get("inputs_embeds")
    sequence = inputs.get("input_ids") if sequence is None else sequence
    scope = RoutingScope(held=_held_cores(inputs.get("past_key_values")))
    if isinstance(sequence, Tensor) and sequence.ndim >= 2:
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        scope.set_positions(*_positions(sequence.shape[:2], mask, inputs.get("labels"), cache))
    if trains:
        scope.trains, scope.balance = True, BalanceLoss(_share_of_loss(inputs))
    scope.model, scope.outer = model, _state.scope
    while scope.outer is not None and scope.outer.model is model:
        scope.outer = scope.outer.outer  # left behind by a KeyboardInterrupt, for which PyTorch calls no hook
    _state.scope = scope


def _close_scope(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    scope = _state.scope
    if scope.computed and _state.held is not None:
        _state.held = {**_state.held, **scope.computed}
    cache = _identity(getattr(output, "past_key_values", None))
    if cache is not None and (scope.held or scope.computed):
        _held_by_cache[cache] = {**scope.held, **scope.computed}
    _state.scope = scope.outer
    if output is None:  # the forward pass failed
        return None
    scope.statistics.add()
    return scope.balance.add_to(output) if scope.balance.terms else None


def _share_of_loss(inputs: dict[str, Any]) -> Tensor | None:
    # transformers' Trainer lets some models divide their loss by the supervised tokens of all accumulated batches.
    total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return None
    supervised = (labels[..., 1:] != IGNORE_INDEX).sum()
    return supervised / (total.to(supervised.device) if isinstance(total, Tensor) else total)


def _named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}


def _held_cores(cache: Any) -> HeldCores | None:
    if _state.held is not None:
        return _state.held
    cache = _identity(cache)
    return None if cache is None else _held_by_cache.get(cache)


def _identity(cache: Any) -> Cache | Tensor | None:
    """What tells a cache from others: itself, or the first tensor of the tuples that transformers 4.37 hands around."""
    if isinstance(cache, Cache):
        return cache
    while isinstance(cache, tuple) and cache:
        cache = cache[0]
    return cache if isinstance(cache, Tensor) else None


def _positions(
    shape: tuple[int, int], attention_mask: Any, labels: Any, cache: Any = None
) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
    instances, length = shape
    attended = prompt = None
    if isinstance(attention_mask, dict):  # by kind of attention, which differ in what is near, not in what is padding
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
        # With a cache the mask also covers the positions before this forward's own.
        attended = attention_mask[:, attention_mask.shape[1] - length :].bool()
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and length > 1:
        begin = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        attended = _not_padding(attention_mask, begin, length)
    if isinstance(labels, Tensor) and tuple(labels.shape) == (instances, length):
        prompt = (labels != IGNORE_INDEX).cumsum(dim=1) == 0
    return (instances, length), attended, prompt


def _not_padding(mask: Tensor, begin: int, length: int) -> Tensor | None:
    """What a mask of queries and keys [B, 1 or heads, S, keys] tells of the queries, bool [B, S].

    transformers makes such masks for caches of a fixed length, `begin` being the key of the first query. They are true,
    or zero, where a query attends to a key. Padding does not attend to itself, or, since some attention kernels fail
    on a query without any key, to all keys, those that come after it too.
    """
    if mask.shape[2] != length or mask.shape[3] < begin + length:
        return None
    attends = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    attended = attends[:, :, begin : begin + length].diagonal(dim1=1, dim2=2).clone()
    attended[:, :-1] &= ~attends[:, :-1].all(dim=-1)
    return attended
