"""Which tensors a run saves, with its adapter and beside it, so that loading has all that training had."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL

Named = Iterable[tuple[str, Any]]
"""Parameters of a model with an adapter, by name (`named_parameters()`)."""

OF_AN_ADAPTER = re.compile(r"\.(?:mix)?lora_\w+\.")
PROJECTOR = "mm_projector"
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def with_the_adapter(parameters: Named, bias: str) -> Iterator[tuple[str, Any]]:
    """The adapter's parameters, and the biases of the language model that were trained with it.

    Args:
        parameters: of the whole model.
        bias: `--lora_bias`: `none`, `all`, or `lora_only` for those of the adapted layers.
    """
    parameters = list(parameters)
    layers = {match.string[: match.start()] for name, _ in parameters if (match := OF_AN_ADAPTER.search(name))}
    adapted = {f"{layer}{inside}.bias" for layer in layers for inside in ("", ".base_layer")}
    for name, parameter in parameters:
        is_bias = name.endswith(".bias") and not re.match(NOT_THE_LANGUAGE_MODEL, name)
        if OF_AN_ADAPTER.search(name) or (is_bias and (bias == "all" or (bias == "lora_only" and name in adapted))):
            yield name, parameter


def beside_the_adapter(parameters: Named, grown: bool) -> Iterator[tuple[str, Any]]:
    """What else the base does not hold: all that was trained, the projector if frozen too, and a grown vocabulary.

    Names are those of the model without the adapter, as upstream loads them before it.

    Args:
        parameters: of the whole model.
        grown: whether the embeddings have rows for tokens that the base does not know.
    """
    for name, parameter in parameters:
        is_grown = grown and name.endswith(EMBEDDINGS)
        if not OF_AN_ADAPTER.search(name) and (parameter.requires_grad or PROJECTOR in name or is_grown):
            yield name.replace(".base_layer.", "."), parameter
