"""`llava.model.llava_arch`: where image features enter the sequence, and the routing scope with them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llava_mixlora import MixLoraError
from llava_mixlora.method.forward_passes import known_answers, refine
from llava_mixlora.method.model_inputs import IGNORE_INDEX

from .patch import METHOD, Patch


def _tell_routing_scope(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(original)
    def prepare_inputs_labels_for_multimodal(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        answers = known_answers()
        call = inspect.signature(original).bind(self, *args, **kwargs)
        token_ids, labels = call.arguments["input_ids"], call.arguments["labels"]
        fits = answers is not None and token_ids.shape == answers.shape
        if fits:
            # Labels are what takes a mask of the tokens along to where image features have made room for themselves.
            call.arguments["labels"] = torch.where(answers.to(token_ids.device), token_ids, IGNORE_INDEX)
        prepared = original(*call.args, **call.kwargs)
        *others, attention_mask, cache, embeddings, refined = prepared
        if embeddings is None:
            return (*others, attention_mask, cache, embeddings, labels)
        if answers is not None and not fits:
            raise MixLoraError(
                f"known_prompt: a mask of shape {tuple(answers.shape)} for token ids of shape "
                f"{tuple(token_ids.shape)}: expected one value for each token, one for an image"
            )
        refine(attention_mask, refined, embeddings)
        if not fits:
            return prepared
        if labels is not None:
            return original(self, *args, **kwargs)
        return (*others, attention_mask, cache, embeddings, None)

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
