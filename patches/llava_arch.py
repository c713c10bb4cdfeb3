"""`llava.model.llava_arch`: where image features enter the sequence, and the routing scope with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_mixlora.method.routing_scope import refine

from .patch import METHOD, Patch


def _tell_routing_scope(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(original)
    def prepare_inputs_labels_for_multimodal(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        prepared = original(self, *args, **kwargs)
        _, _, attention_mask, _, embeddings, labels = prepared
        if embeddings is not None:
            refine(attention_mask, labels, embeddings)
        return prepared

    return prepare_inputs_labels_for_multimodal


PATCHES = (
    Patch(
        "llava.model.llava_arch:LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal",
        kind=METHOD,
        why="the mask and the labels of the sequence that the layers see, image features included, first exist here",
        replace=_tell_routing_scope,
        parameters=("position_ids", "attention_mask", "labels"),  # those that take positions return six values
    ),
)
