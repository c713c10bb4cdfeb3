"""Which adapted layers of a model can be worked on together: those of one block, and those that see one input.

Starting an operation costs a GPU's host some microseconds, whatever its size, and a router's operations are tiny. What
layers have in common is told by their names, so it is the same in every forward pass: a checkpoint that runs a block
again must do what it did before. Where a name misleads (the keys of a cross attention are of other states than its
queries), the layers notice by what they are given, and each works alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

from torch import nn

FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of layers in one module that are given the same tensor."""


Runs = tuple[tuple[Any, ...], ...]
"""Layers, by what they are given: those of a run are given the same tensor."""


class _Known(NamedTuple):
    """What is known of a model: of each adapted layer the runs of its block, and of an adapter in it its companions."""

    blocks: dict[nn.Module, Runs]
    companions: dict[tuple[nn.Module, str], Runs | None]


class _ThreadState(local):
    separately = False


_state = _ThreadState()
_of_models: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


@contextmanager
def separately() -> Iterator[None]:
    """Let the layers of the body's forward passes, in this thread, work each by itself, as the formulas are written.

    It is what the faster ways are tested against, and tells whether a surprise is theirs.
    """
    outer, _state.separately = _state.separately, True
    try:
        yield
    finally:
        _state.separately = outer


def works_separately() -> bool:
    """Whether this thread is in [`separately`]."""
    return _state.separately


def companions_of(layer: Any, adapter: str, root: nn.Module | None) -> Runs | None:
    """The layers of the adapted model `root` whose adapter is routed as that of `layer` is, by the same; it is one.

    Those of its block where routers see words, else those that are given the same tensor. None where it is alone.
    """
    if root is None:
        return None
    if root not in _of_models:
        _of_models[root] = _Known(_blocks_in(root), {})
    blocks, companions = _of_models[root]
    key = layer, adapter
    if key not in companions:
        companions[key] = _alike(layer, adapter, blocks.get(layer, ()))
    return companions[key]


def _alike(layer: Any, adapter: str, block: Runs) -> Runs | None:
    settings = layer.settings[adapter]
    runs = block if settings.router_width is not None else [run for run in block if layer in run]
    runs = [tuple(each for each in run if each.settings.get(adapter) == settings) for run in runs]
    runs = tuple(run for run in runs if run)
    return runs if sum(map(len, runs)) > 1 else None


def forget(root: nn.Module) -> None:
    """Look anew for the layers of a model that has got others."""
    _of_models.pop(root, None)


def _blocks_in(root: nn.Module) -> dict[nn.Module, Runs]:
    blocks: dict[str, dict[tuple[str, tuple[str, ...]], list[nn.Module]]] = {}
    for name, module in root.named_modules():
        if hasattr(module, "mixlora_A") and not module.is_expert:
            parent, _, leaf = name.rpartition(".")
            family = next((names for names in FAMILIES if leaf in names), (leaf,))
            blocks.setdefault(_block(name), {}).setdefault((parent, family), []).append(module)
    found = {}
    for runs in blocks.values():
        block = tuple(tuple(run) for run in runs.values())
        found.update({layer: block for run in block for layer in run})
    return found


def _block(name: str) -> str:
    """The name of the numbered module (a decoder layer) that a module is in; of the one around it, if there is none."""
    parts = name.split(".")[:-1]
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts)
