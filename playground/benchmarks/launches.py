"""How many operations a step starts: what a GPU's host has to do, however small the tensors are.

An operation is one call into PyTorch that computes something, as its dispatcher sees it: views and allocations are
none. On a GPU most of them are one kernel. The counts are the same on every machine, so they can be bounds of a test.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from playground.benchmarks.variants import MIXLORA, REFERENCE, adapters

LINEARS = 7  # of a Llama's decoder layer
KINDS = ("forward", "backward", "decoding")
INSTANCES, POSITIONS = 4, 32
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_WITHOUT_WORK = {*_ALLOCATIONS, "_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "promote_types"}


def add_arguments(commands: Any) -> None:
    """Add the command `launches` to argparse's `commands`."""
    command = commands.add_parser(
        "launches",
        help="how many operations an adapter adds to a linear layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=lambda arguments: print(markdown()))


def markdown() -> str:
    """What LoRA and each form of MixLoRA add for each linear layer of a Llama, as a Markdown table."""
    lines = [
        "| operations added to a linear layer, E=16, r=4 | training step | with gradient checkpointing | decoding |",
        "| --- | --- | --- | --- |",
    ]
    for name in (REFERENCE, *MIXLORA):
        plain, checkpointed = (
            added_per_linear(lambda name=name: adapters(16, 4)[name], checkpointing) for checkpointing in (False, True)
        )
        steps = (each["forward"] + each["backward"] for each in (plain, checkpointed))
        cells = [*steps, plain["decoding"]]
        lines.append(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)


class Launches(TorchDispatchMode):
    """Counts what its body starts: `counts` by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, unless it only looks at a tensor in another way, and run it."""
        schema = operation._schema
        name = schema.name.partition("::")[2]
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not is_view and name not in _WITHOUT_WORK:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def launches_of(step: Callable[[], Any]) -> int:
    """How many operations a step starts."""
    with Launches() as launches:
        step()
    return launches.counts.total()


def of_decoder_layer(adapter: Any, checkpointing: bool = True, **options: Any) -> dict[str, float]:
    """What a Llama's decoder layer starts in each of [`KINDS`], its seven linear layers adapted.

    Args:
        adapter: makes the PEFT configuration; None for the frozen base.
        checkpointing: whether training runs the layer again in the backward pass, as upstream's scripts let it.
        options: those of [`step_of`].
    """
    few, many = (_of_model(layers, adapter, checkpointing, **options) for layers in (1, 3))
    return {kind: (many[kind] - few[kind]) / 2 for kind in KINDS}


def added_per_linear(adapter: Any, checkpointing: bool = True, **options: Any) -> dict[str, float]:
    """What an adapter adds to that for each linear layer."""
    frozen, adapted = (of_decoder_layer(each, checkpointing, **options) for each in (None, adapter))
    return {kind: round((adapted[kind] - frozen[kind]) / LINEARS, 2) for kind in KINDS}


def _of_model(
    layers: int, adapter: Any, checkpointing: bool, autocast: bool = False, reentrant: bool = True
) -> dict[str, int]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4, vocab_size=100
    )
    model: nn.Module = LlamaForCausalLM(config).requires_grad_(False)
    if adapter is not None:
        model = get_peft_model(model, adapter())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.randint(0, 100, (INSTANCES, POSITIONS))
    labels = ids.clone()
    labels[:, : POSITIONS // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch, use_cache=False).loss

    model.train()
    forward().backward()
    model.zero_grad(set_to_none=True)
    with Launches() as in_forward:
        loss = forward()
    with Launches() as in_backward:
        loss.backward()
    model.eval()
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with Launches() as in_decoding:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    counted = (in_forward, in_backward, in_decoding)
    return {kind: launches.counts.total() for kind, launches in zip(KINDS, counted)}
