"""Which forward pass a layer belongs to when gradient checkpointing runs it again during a backward pass.

Whoever checkpoints (transformers, `torch.utils.checkpoint` in both forms, its wrapper, FSDP, DeepSpeed), the layers run
a second time inside of the backward pass, where nothing tells what the model was called with. But a backward pass
enters a forward pass through what that has returned, before any of its layers. So [`Announcements.follow`] makes the
output's nodes in the autograd graph announce the forward pass, and [`Announcements.announced`] gives a layer that runs
within a backward pass the one that was announced: of several, the innermost in which the running node was made, by
autograd's own numbering of nodes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Pass = TypeVar("Pass")

NO_BACKWARD = -1

# These are not documented; a torch that lacks one still tells apart what comes one after the other.
_next_number = getattr(torch.autograd, "_get_sequence_nr", None)
_running_node = getattr(torch._C, "_current_autograd_node", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_SELECTIVE = tuple(
    getattr(checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(checkpoint, name)
)


def running_backward() -> int:
    """The number of the backward pass that this thread runs a node of, or [`NO_BACKWARD`]."""
    return torch._C._current_graph_task_id()


def next_node() -> int:
    """The number that autograd gives the next node which this thread makes; 0 where that cannot be known."""
    return 0 if _next_number is None else _next_number()


def saving_hooks() -> Any:
    """What packs the tensors that autograd saves now: a checkpoint's part of the forward pass has hooks of its own."""
    return None if _top_hooks is None else _top_hooks(True)


def is_checkpointed_selectively() -> bool:
    """Whether a checkpoint keeps what some operations return, or hands it out again instead of running them."""
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


def part_of_graph() -> Hashable:
    """Tells apart what checkpoints run for themselves, now and again later: they cannot share tensors with a graph.

    Equal for two moments between which a forward pass, or what a node of a backward pass runs again, goes on.
    """
    task = running_backward()
    if _top_hooks is None or (task != NO_BACKWARD and _running_node is None):
        return object()
    node = None if task == NO_BACKWARD else _running_node()
    return torch.is_grad_enabled(), saving_hooks(), task, None if node is None else node._sequence_nr()


@dataclass(frozen=True)
class _Entered(Generic[Pass]):
    """A forward pass, and the numbers of the autograd nodes that it has made: begin <= number < end."""

    forward_pass: Pass
    whole: Any
    begin: int
    end: int


class _Task:
    """Lives as long as a backward pass does, whether it ends or fails."""


class Announcements(Generic[Pass]):
    """The forward passes that running backward passes have entered."""

    def __init__(self) -> None:
        self._entered: dict[int, list[_Entered[Pass]]] = {}  # by backward pass
        self._last = threading.local()  # .entered: the backward pass and the forward pass that came last in a thread

    def follow(self, output: Any, forward_pass: Pass, whole: Any, begin: int) -> None:
        """Let a backward pass through any tensor in a model's `output` announce the forward pass that made it.

        `whole`: what it shares with the forward passes that it is a part of; `begin`: [`next_node`] before it.
        """
        entered = _Entered(forward_pass, whole, begin, next_node())

        def announce(_: Any) -> None:
            self._announce(entered)

        for node in {tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None}:
            node.register_prehook(announce)

    def announced(self) -> Pass | None:
        """The forward pass that the running node belongs to; None where that is not known."""
        task = running_backward()
        last_task, last = getattr(self._last, "entered", (NO_BACKWARD, None))
        if task not in self._entered:
            # Reentrant checkpoints start a backward pass of their own inside of the one that was announced.
            return last.forward_pass if last_task in self._entered else None
        node = None if _running_node is None else _running_node()
        if node is None or _next_number is None:
            return last.forward_pass if last_task == task else None
        number = node._sequence_nr()
        made = [each for each in self._entered[task] if each.begin <= number < each.end]
        if any(each.whole is not made[0].whole for each in made):  # of several threads, each of which counts for itself
            made = [each for each in made if last_task == task and each.whole is last.whole]
        if not made:
            return None
        innermost = min(made, key=lambda each: each.end - each.begin)
        self._last.entered = task, innermost
        return innermost.forward_pass

    def _announce(self, entered: _Entered[Pass]) -> None:
        task = running_backward()
        if task not in self._entered:
            self._entered[task] = []
            lasting = _Task()
            weakref.finalize(lasting, self._entered.pop, task, None).atexit = False
            # Autograd lets go of a callback with its backward pass, even one that fails and never calls it.
            Variable._execution_engine.queue_callback(lambda: lasting and None)
        if all(entered is not each for each in self._entered[task]):
            self._entered[task].append(entered)
        self._last.entered = task, entered


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in tuples and dictionaries too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
