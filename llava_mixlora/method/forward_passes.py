"""Knows of every forward pass of an adapted model which sequence it runs, and of every generation which prompt.

- A forward pre-hook on the adapted model opens a [`RoutingScope`] from its inputs, a post-hook closes it.
- The transformers models inside of it have such hooks too, for they may be called by themselves, as a decoder is by
  what computes its own head, or see a sequence of their own, as the two halves of an encoder-decoder do.
- Code that changes the sequence on the way in (LLaVA puts image features into it) calls [`refine`].
- Whoever knows better what is prompt says so with [`known_prompt`].
- Layers that gradient checkpointing runs again in a backward pass find the scope through the autograd graph
  (`recomputation`).
- The model's `generate` is one [`generation`], whose routes are those of the prompt that it was given.

Scopes live in a `threading.local` (a `ContextVar` would break the graph of `torch.compile`), so threads that use one
model at the same time do not see each other's. Hooks stay outside of compiled graphs, which would lose what they write.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from ..errors import MixLoraError
from . import companions
from .held_routes import HeldRoutes, bind, routes_of
from .known_prompt import KnownPrompt
from .model_inputs import (
    IGNORE_INDEX,
    answered_positions,
    attended_positions,
    cached_instances,
    cached_positions,
    image_positions,
    sample_starts,
)
from .recomputation import NO_BACKWARD, Announcements, next_node, running_backward
from .router_loss import RouterLoss
from .routing_scope import Average, RoutingScope
from .word_centre import input_embeddings

TASKS = "mixlora_tasks"
"""What a batch calls the numbers of its instances' tasks, int64 [B]; the adapted model takes it, its base does not."""


class _Generation:
    """One call of `generate`."""

    def __init__(self, prompt_length: int | None = None) -> None:
        self.prompt_length = prompt_length  # tokens that the caller gave; None where they are not counted in tokens
        self.has_begun = False
        self.routes = HeldRoutes()
        self.cache: Any = None  # what its first forward pass filled
        self.begun: list[tuple[Tensor, HeldRoutes]] = []  # forward passes without a cache: token ids, and routes
        self.known: KnownPrompt | None = None  # of the sequence that the prompt became on its way into the model
        self.images: Tensor | None = None  # bool [B, S], where that sequence has image features

    def begun_with(self, ids: Any) -> HeldRoutes:
        """The routes of a forward pass of token ids [B, S] without a cache: those of an earlier one that they continue.

        Guidance has others beside the generation's, of a negative prompt.
        """
        if not isinstance(ids, Tensor) or not self.begun:
            return self.routes
        return next((routes for prompt, routes in self.begun if _continues(ids, prompt)), HeldRoutes())


def _continues(ids: Tensor, prompt: Tensor) -> bool:
    if ids.shape[1] < prompt.shape[1] or len(ids) % len(prompt):
        return False
    return torch.equal(ids[:, : prompt.shape[1]], prompt.repeat_interleave(len(ids) // len(prompt), dim=0))


class _ThreadState(threading.local):
    scope: RoutingScope | None = None  # of the innermost forward pass that is running
    generation: _Generation | None = None  # the innermost that is running
    known: KnownPrompt | None = None
    named: tuple[nn.Module, Sequence[str]] | None = None  # a model, and the adapters that its instances are for


_state = _ThreadState()
_announcements: Announcements[RoutingScope] = Announcements()
_parts: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
"""The [`_models_inside`] of adapted models."""
_images_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Where sequences that were made outside of any forward pass, [B, S, d], have image features, bool [B, S]."""
_averages: weakref.WeakKeyDictionary[nn.Module, dict[str, Average]] = weakref.WeakKeyDictionary()
"""What the routers of each adapter of adapted models average."""


def current_scope() -> RoutingScope | None:
    """The scope of the forward pass that this thread is in."""
    return _state.scope


def scope_of_layer() -> tuple[RoutingScope | None, bool]:
    """The scope of the forward pass that a layer runs in, and whether a checkpoint runs it for the second time.

    Raises:
        MixLoraError: it runs within a backward pass, and nothing tells of which forward pass.
    """
    scope = _state.scope
    if torch.compiler.is_compiling():
        return scope, False
    task = running_backward()
    if task == NO_BACKWARD or (scope is not None and scope.backward == task):
        return scope, False
    scope = _announcements.announced()
    if scope is None:
        raise MixLoraError(
            "a checkpoint runs this layer again in a backward pass that did not begin at the model's output, so which "
            "positions its routers average is not known: start the backward pass from what the model returns (its "
            "loss, logits or hidden states), or do without gradient checkpointing here"
        )
    return scope, True


@contextmanager
def use_scope(scope: RoutingScope | None) -> Iterator[None]:
    """Run the body as part of the forward pass that `scope` belongs to."""
    outer, _state.scope = _state.scope, scope
    try:
        yield
    finally:
        _state.scope = outer


@contextmanager
def generation(prompt_length: int | None = None) -> Iterator[Callable[[], HeldRoutes]]:
    """Run the body as one generation: routes that its first forward computes hold for all its forwards.

    `prompt_length`: how many tokens were given; what a first forward pass has beyond them was drafted. What the body
    gets tells the routes that are held so far.
    """
    running = _Generation(prompt_length)
    outer, _state.generation = _state.generation, running
    try:
        yield lambda: running.routes
    finally:
        _state.generation = outer


@contextmanager
def known_prompt(prompt: Any = None, answers: Any = None) -> Iterator[None]:
    """Say which positions are prompt in the forward passes, or the generation, of the body.

    Args:
        prompt: bool [B, S], exactly the positions that routers with `router_scope="prompt"` average in their row (or,
            of packed samples, in their sample); padding among them is left out.
        answers: bool [B, S], True where the model has answered or shall answer, as `labels != -100` tells it. With
            several answers in a row each is routed by all that precedes it, as in training: of a prompt that holds a
            conversation, mark the answers in it (`apply_chat_template(..., return_assistant_tokens_mask=True)`).

    S is the length of what the model is given, before a LLaVA puts image features into it. It takes precedence over
    `labels`. Other threads do not see it.

    Raises:
        MixLoraError: a mask is no mask, has a row without any prompt, contradicts the other, or does not fit the
            sequence of a forward pass.
    """
    outer, _state.known = _state.known, KnownPrompt(prompt, answers)
    try:
        yield
    finally:
        _state.known = outer


def known_answers() -> Tensor | None:
    """What [`known_prompt`] was told as answers, or all that it was not told to be prompt, bool [B, L]; None outside.

    Who changes the sequence hands this to [`refine`], as `labels` that are -100 where it is False.
    """
    known = _state.known
    if known is None:
        return None
    return known.answers if known.answers is not None else ~known.prompt


def refine(
    attention_mask: Tensor | None, labels: Tensor | None, embeddings: Tensor, images: Tensor | None = None
) -> None:
    """Tell the running forward pass what its sequence has become: `embeddings` [B, S, d] with its mask and labels.

    While the caller knows the prompt (see [`known_answers`]), `labels` are those answers in the new sequence. `images`:
    bool [B, S], True at image features; outside of any forward pass they are kept for one that is given `embeddings`.
    """
    scope, running, known = _state.scope, _state.generation, _state.known
    answered = labels != IGNORE_INDEX if isinstance(labels, Tensor) else None
    prompt = None
    if known is not None and known.prompt is not None and answered is not None:
        prompt, answered = ~answered, None
    if scope is not None:
        shape = tuple(embeddings.shape[:2])
        attended = attended_positions(attention_mask, shape)
        scope.set_positions(shape, attended, answered, prompt=prompt, rest_is_asked=known is not None, images=images)
        scope.see_words(embeddings)
    elif running is not None:
        running.prompt_length = embeddings.shape[1]
        running.known = None if known is None else KnownPrompt(prompt, answered)
        running.images = images
    elif images is not None:
        _images_of[embeddings] = images


def scope_of_prompts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> RoutingScope:
    """The scope of a forward pass of an adapted model that is not run, of prompts [B, S]."""
    scope = RoutingScope()
    scope.model = scope.root = model
    _read_inputs(scope, {"input_ids": input_ids, "attention_mask": attention_mask}, None)
    return scope


@contextmanager
def named_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the body, forward passes of an adapted model or its generation, with one adapter for each instance."""
    outer, _state.named = _state.named, (model, list(names))
    try:
        yield
    finally:
        _state.named = outer


def attach(
    model: nn.Module, adapter: str = "default", router_scope: str = "prompt", router_input: str = "hidden"
) -> None:
    """Open a scope around every forward pass of `model`, and make its `generate` one generation.

    The second time, it only looks for further models inside of `model` that have adapted layers, and takes in what
    another adapter's routers average.
    """
    words = router_input == "words"
    _averages.setdefault(model, {})[adapter] = Average(router_scope, words)
    embeddings = input_embeddings(model) if words else None
    if embeddings is not None and _see_words not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(_see_words)
    if not is_attached(model):
        model.register_forward_pre_hook(_open_scope, with_kwargs=True)
        model.register_forward_hook(_close_scope, with_kwargs=True, always_call=True)
        if callable(getattr(model, "generate", None)):
            model.generate = _OneGeneration(model)
    _parts.pop(model, None)
    companions.forget(model)
    for module in _parts_of(model):
        if not is_attached(module):
            module.register_forward_pre_hook(_enter_part, with_kwargs=True)
            module.register_forward_hook(_leave_part, with_kwargs=True, always_call=True)


def is_attached(model: nn.Module) -> bool:
    """Whether [`attach`] was called on `model`, or on one that it is a part of."""
    return any(hook in (_open_scope, _enter_part) for hook in model._forward_pre_hooks.values())


def detach(model: nn.Module) -> None:
    """Undo [`attach`]."""
    companions.forget(model)
    for module in (model, *_models_inside(model)):
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook in (_open_scope, _enter_part)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key in [key for key, hook in module._forward_hooks.items() if hook in (_close_scope, _leave_part)]:
            del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]
            del module._forward_hooks_always_called[key]
    embeddings = input_embeddings(model)
    if embeddings is not None:
        for key in [key for key, hook in embeddings._forward_hooks.items() if hook is _see_words]:
            del embeddings._forward_hooks[key]
    generate = model.__dict__.get("generate")
    if isinstance(generate, _OneGeneration):
        del model.generate
        if generate.of_instance is not None:
            model.generate = generate.of_instance


@torch.compiler.disable
def _see_words(module: nn.Module, args: tuple[Any, ...], embeddings: Any) -> None:
    scope = _state.scope
    if scope is not None and isinstance(embeddings, Tensor) and embeddings.ndim == 3:
        scope.see_words(embeddings)
        scope.settle(_averages_of(scope))


def _averages_of(scope: RoutingScope) -> dict[str, Average]:
    """What the active adapters' routers average in the scope's model."""
    layer = next((module for module in scope.root.modules() if hasattr(module, "mixlora_A")), None)
    if layer is None or layer.disable_adapters:
        return {}
    averages = _averages.get(scope.root, {})
    return {adapter: average for adapter, average in averages.items() if adapter in layer.active_adapters}


def _parts_of(root: nn.Module) -> weakref.WeakSet[nn.Module]:
    if root not in _parts:
        _parts[root] = weakref.WeakSet(_models_inside(root))
    return _parts[root]


def _models_inside(model: nn.Module) -> list[nn.Module]:
    """The models of token sequences inside of `model`."""
    return [
        module
        for module in model.modules()
        if module is not model
        and isinstance(module, PreTrainedModel)
        and not {"input_ids", "inputs_embeds"}.isdisjoint(_parameters(type(module)))
    ]


@functools.cache
def _parameters(model_class: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


class _OneGeneration:
    """The `generate` of an adapted model; an object, for a bound function would be lost in a pickle of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.of_instance = model.__dict__.get("generate")  # of a program that has put another there
        self.__wrapped__, self.__doc__ = model.generate, model.generate.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _chunk_size(self.model, args, kwargs):
            # Routes are made of the whole prompt in every layer, so there is nothing to save by its parts.
            kwargs["prefill_chunk_size"] = None
        with generation(_prompt_length(self.model, args, kwargs)):
            _state.generation.images = _no_images(self.model, args, kwargs)
            return self.__wrapped__(*args, **kwargs)


def _chunk_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    configs = [kwargs.get("generation_config"), *args, getattr(model, "generation_config", None)]
    sizes = (getattr(config, "prefill_chunk_size", None) for config in configs if not isinstance(config, Tensor))
    return kwargs.get("prefill_chunk_size") or next((size for size in sizes if size), None)


def _prompt_length(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    if _is_encoder_decoder(model):
        start = kwargs.get("decoder_input_ids")
        return start.shape[1] if isinstance(start, Tensor) else None
    given = _given_tokens(args, kwargs)
    return None if given is None else given.shape[1]


def _given_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids [B, S] that a generation is given."""
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs", args[0] if args else None) if given is None else given
    return given if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] else None


def _no_images(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """All False [B, S] where a prompt is text alone: a LLaVA's forward passes see embeddings, and could not tell."""
    given = _given_tokens(args, kwargs)
    if given is None:
        return None
    images, unknown = image_positions(model, {**kwargs, "input_ids": given}, tuple(given.shape))
    return torch.zeros_like(given, dtype=torch.bool) if images is None and unknown is None else None


@torch.compiler.disable
def _open_scope(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    outer = _state.scope
    while outer is not None and outer.root is model:
        outer = outer.outer  # left behind by a KeyboardInterrupt, for which PyTorch calls no hook
    tasks = kwargs.get(TASKS)
    given = {name: value for name, value in kwargs.items() if name != TASKS}
    inputs = _named_inputs(model, args, given)
    scope = RoutingScope()
    scope.model = scope.root = model
    scope.tasks = tasks
    scope.outer, scope.backward, scope.first_node = outer, running_backward(), next_node()
    scope.trains = model.training and torch.is_grad_enabled()
    if scope.trains:
        scope.router_loss = RouterLoss(_share_of_loss(inputs))
    _hold(scope, inputs)
    if _is_encoder_decoder(model):
        scope.labels = inputs.get("labels")
    elif _answers_nothing(model):
        scope.role = "encoder"
        _read_inputs(scope, inputs, None)
    else:
        _read_inputs(scope, inputs, inputs.get("labels"))
    _name_adapters(scope, inputs)
    _see_pictures(scope, inputs)
    _state.scope = scope
    return (args, given) if TASKS in kwargs else None


@torch.compiler.disable
def _close_scope(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    scope = _state.scope
    if scope is None or scope.model is not model:
        return None  # the inputs were refused before a scope was opened
    _state.scope = scope.outer
    scope.forget_words()
    if output is None:  # the forward pass failed
        return None
    cache = getattr(output, "past_key_values", None)
    running = _state.generation
    if running is not None:
        running.has_begun = True
    if scope.computed or scope.held.cores:
        routes = scope.routes()
        bind(cache, routes)
        if running is not None and (scope.held is running.routes or not running.routes.cores):
            running.routes, running.cache = routes, cache
        if running is not None and cache is None and scope.begins is not None:
            running.begun.append((scope.begins, routes))
    scope.statistics.add()
    scope.add_words()
    if scope.router_loss.terms:
        output = scope.router_loss.add_to(output)
    if torch.is_grad_enabled():
        _announcements.follow(output, scope, scope.whole, scope.first_node)
    return output


@torch.compiler.disable
def _enter_part(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    scope = _state.scope
    if scope is None and running_backward() != NO_BACKWARD:
        return None  # a checkpoint around the whole module: its layers find the scope that it has run under
    inputs = _named_inputs(module, args, kwargs)
    if scope is None or module not in _parts_of(scope.root):
        return _open_scope(module, args, kwargs)
    shape = _shape(inputs)
    if shape is None or (shape == scope.shape and not _is_encoder_decoder(scope.root)):
        _see_pictures(scope, inputs)
        scope.settle(_averages_of(scope))
        return None
    part = scope.part()
    part.model, part.first_node = module, next_node()
    if _is_encoder_decoder(scope.root):
        part.role = "decoder" if "encoder_hidden_states" in inputs else "encoder"
    if part.role == "decoder" and isinstance(states := inputs["encoder_hidden_states"], Tensor):
        memory = part.part()
        memory.role = "encoder"
        shape = tuple(states.shape[:2])
        memory.set_positions(shape, attended_positions(inputs.get("encoder_attention_mask"), shape))
        part.memory = states, memory
    _read_inputs(part, inputs, _shifted(scope.whole.labels) if part.role == "decoder" else None)
    _state.scope = part
    return None


@torch.compiler.disable
def _leave_part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    scope = _state.scope
    if scope is None or scope.model is not module:
        return None
    if scope.root is module:
        return _close_scope(module, args, kwargs, output)
    _state.scope = scope.outer
    scope.forget_words()
    if output is not None and torch.is_grad_enabled():
        _announcements.follow(output, scope, scope.whole, scope.first_node)
    return None


def _answers_nothing(model: nn.Module) -> bool:
    """Whether labels tell the class of a sequence or of its tokens, and not what goes on with it."""
    is_adapted = _open_scope in model._forward_pre_hooks.values()  # and no decoder that is called without its head
    return is_adapted and isinstance(model, PreTrainedModel) and not model.can_generate()


def _is_encoder_decoder(model: nn.Module | None) -> bool:
    # The configuration says so of the encoder by itself too, which generation calls first.
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(both) and "decoder_input_ids" in _parameters(type(model))


def _shifted(labels: Any) -> Any:
    """Labels of an encoder-decoder, which stand where they are predicted, at the positions that they belong to."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    return nn.functional.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)


def _hold(scope: RoutingScope, inputs: dict[str, Any]) -> None:
    """Find the routes that the forward pass goes on with."""
    cache, running = inputs.get("past_key_values"), _state.generation
    if running is not None and running.routes.cores and cache is running.cache is not None:
        scope.held, scope.goes_on = running.routes, True
        return
    filled = cached_positions(cache) > 0 if not isinstance(cache, tuple) else bool(cache)
    if filled:
        routes = routes_of(cache)
        if routes is None and running is not None:
            routes = running.routes  # of a tuple that was put together anew
        scope.held = HeldRoutes() if routes is None else routes
        scope.goes_on = not isinstance(cache, tuple)
        instances, shape = cached_instances(cache), _shape(inputs)
        if instances is not None and shape is not None and instances != shape[0]:
            raise MixLoraError(
                f"a cache of {instances} instances goes on with {shape[0]}: pass as many, or repeat the cache first "
                "(batch_repeat_interleave)"
            )
    elif running is not None and running.cache is None:
        ids = None if _is_encoder_decoder(scope.root) else inputs.get("input_ids")
        scope.held = running.begun_with(ids)
        if isinstance(ids, Tensor) and not scope.held.cores:
            scope.begins = ids


def _shape(inputs: dict[str, Any]) -> tuple[int, int] | None:
    sequence = inputs.get("inputs_embeds")
    sequence = inputs.get("input_ids") if sequence is None else sequence
    return tuple(sequence.shape[:2]) if isinstance(sequence, Tensor) and sequence.ndim >= 2 else None


def _read_inputs(scope: RoutingScope, inputs: dict[str, Any], labels: Any) -> None:
    """Tell the scope what a model's inputs say of its sequence."""
    shape = _shape(inputs)
    if shape is None:
        return
    cache, running, known = inputs.get("past_key_values"), _state.generation, _state.known
    if known is not None and running is not None and running.known is not None:
        known = running.known
    attended = attended_positions(inputs.get("attention_mask"), shape, cache)
    if scope.goes_on and shape[1] == 1:
        scope.set_positions(shape, attended)
        return
    answered = answered_positions(labels, inputs.get("logits_to_keep"), shape)
    prompt = None
    begin = cached_positions(cache)
    if known is not None and not (begin and scope.held.cores):
        prompt, answered = known.fitted(shape, begin, running is not None)
        if prompt is not None and attended is not None and not (prompt & attended).any(dim=1).all():
            raise MixLoraError("known_prompt: a row's prompt has no position but padding; routers average at least one")
    starts = None if scope.goes_on else sample_starts(inputs, shape, attended)
    given = None
    is_first = running is not None and not running.has_begun and not scope.goes_on
    if is_first and running.prompt_length is not None and inputs.get("inputs_embeds") is None:
        given = running.prompt_length
        if shape[1] < given:
            raise MixLoraError(
                f"generate() was given {given} positions and begins with {shape[1]} of them: routes are those of the "
                "whole prompt, so pass it at once"
            )
    images, images_unknown = _images(scope, inputs, shape)
    if prompt is not None:
        images_unknown = None  # the caller has said exactly what is averaged
    scope.set_positions(shape, attended, answered, starts, prompt, given, known is not None, images, images_unknown)
    if isinstance(embeddings := inputs.get("inputs_embeds"), Tensor):
        scope.see_words(embeddings)


def _see_pictures(scope: RoutingScope, inputs: dict[str, Any]) -> None:
    """Take in what a decoder's layers attend to in pictures (Mllama's), which are no positions of its sequence.

    `cross_attention_states` [B·n, P, d], a row for each of n tiles; `cross_attention_mask` [B, 1, S, n·P] is 0 where a
    position attends, and all of it where `full_text_row_masked_out_mask` [B, 1, S, 1] is 0, before the first picture.
    """
    states, shape = inputs.get("cross_attention_states"), _shape(inputs)
    if not isinstance(states, Tensor) or states.ndim != 3 or shape is None or len(states) % max(1, shape[0]):
        return
    places = shape[0], states.shape[:2].numel() // shape[0]
    mask, sees = inputs.get("cross_attention_mask"), inputs.get("full_text_row_masked_out_mask")
    attended = None
    if isinstance(mask, Tensor) and isinstance(sees, Tensor) and mask.shape[-1] == places[1]:
        attended = ((mask == 0) & (sees != 0)).any(dim=2)[:, 0]
    pictures = scope.part()
    pictures.role, pictures.asked_by = "encoder", scope
    pictures.set_positions(places, attended)
    scope.memory = states, pictures


def _images(scope: RoutingScope, inputs: dict[str, Any], shape: tuple[int, int]) -> tuple[Tensor | None, str | None]:
    """Where image features stand, or why that is not known, of a sequence that a model is given."""
    running = _state.generation
    told = None if running is None or inputs.get("input_ids") is not None else running.images
    if told is None and isinstance(embeddings := inputs.get("inputs_embeds"), Tensor):
        told = _images_of.get(embeddings)
    if told is None:
        return image_positions(scope.model, inputs, shape)
    told = told.repeat_interleave(max(1, shape[0] // len(told)), dim=0)
    return nn.functional.pad(told, (0, shape[1] - told.shape[1])), None


def _name_adapters(scope: RoutingScope, inputs: dict[str, Any]) -> None:
    if _state.named is None or _state.named[0] is not scope.root:
        return
    names, shape = _state.named[1], _shape(inputs)
    if shape is not None and _state.generation is not None and len(names) and shape[0] % len(names) == 0:
        # Generation repeats every prompt for its beams or continuations before the first forward pass.
        names = [name for name in names for _ in range(shape[0] // len(names))]
    scope.adapter_names = names


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
