"""`llava.model.llava_arch`: where image features enter the sequence, and the routing scope with them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.pickles import TensorsOnly
from llava_mixlora.data.answers import answer_mark, answers_alone
from llava_mixlora.data.picture_size import take_size_of
from llava_mixlora.method.forward_passes import known_answers, refine
from llava_mixlora.method.model_inputs import IGNORE_INDEX

from .patch import FAULT, METHOD, Patch

MODALITIES = "modalities"
_answer_mark: torch.Tensor | None = None
_given_embeddings: ContextVar[torch.Tensor | None] = ContextVar("inputs_embeds of a forward pass", default=None)


def find_answers_of(tokenizer: Any) -> None:
    """From here on answers are told by the labels of the data that is prepared with this tokenizer.

    Of the process, as the conversation template of that data is.
    """
    global _answer_mark
    _answer_mark = answer_mark(tokenizer)


def _keep_given_embeddings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _given_embeddings.set(kwargs.get("inputs_embeds"))
        try:
            return original(self, *args, **kwargs)
        finally:
            _given_embeddings.reset(token)

    return forward


def _tell_routing_scope(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(original)
    def prepare_inputs_labels_for_multimodal(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        answers, given = known_answers(), _given_embeddings.get()
        call = inspect.signature(original).bind(self, *args, **kwargs)
        token_ids, labels = call.arguments["input_ids"], call.arguments["labels"]
        if token_ids is None and given is not None:
            *before, _, labels = original(*call.args, **call.kwargs)
            return (*before, given, labels)
        _name_all_modalities(call, len(token_ids))
        # Upstream only moves labels along with their tokens, and fills in IGNORE_INDEX at image features and padding.
        # So places in their stead come back as the place that each position of the new sequence comes from.
        call.arguments["labels"] = torch.arange(token_ids.shape[1], device=token_ids.device).expand(token_ids.shape)
        # Those that take positions return them too, before the mask.
        *others, attention_mask, cache, embeddings, places = original(*call.args, **call.kwargs)
        if len(others) == 1:
            attention_mask = _padding_masked(call.arguments["attention_mask"], attention_mask, embeddings, places)
        if embeddings is None:
            return (*others, attention_mask, cache, embeddings, labels)
        if answers is not None and token_ids.shape != answers.shape:
            raise MixLoraError(
                f"known_prompt: a mask of shape {tuple(answers.shape)} for token ids of shape "
                f"{tuple(token_ids.shape)}: expected one value for each token, one for an image"
            )
        told = None if labels is None else answers_alone(token_ids, labels, _answer_mark, IGNORE_INDEX)
        if answers is not None:
            told = torch.where(answers.to(token_ids.device), token_ids, IGNORE_INDEX)
        # Padding is a position of no token too; routers leave it out by the mask.
        refine(attention_mask, _moved(told, places), embeddings, images=places == IGNORE_INDEX)
        return (*others, attention_mask, cache, embeddings, _moved(labels, places))

    return prepare_inputs_labels_for_multimodal


def _name_all_modalities(call: inspect.BoundArguments, rows: int) -> None:
    """Name one for each row, where a fork asks for them: it would cut the batch to as many rows as are named."""
    if MODALITIES in call.signature.parameters:
        call.apply_defaults()
        named = call.arguments[MODALITIES]
        named = [named] if isinstance(named, str) else list(named)
        call.arguments[MODALITIES] = named * rows if len(named) == 1 else named


def _padding_masked(
    given: torch.Tensor | None, returned: torch.Tensor | None, embeddings: torch.Tensor | None, places: torch.Tensor
) -> torch.Tensor | None:
    """The mask [B, S] of a sequence that image features are in, by the mask [B, tokens] that was given.

    LLaVA of 2023 puts ones for the features before the mask, whose padding on the left then lies within them, and
    forgets it altogether where it goes on from a cache.
    """
    if given is None or returned is None:
        return returned
    if embeddings is None:
        more = returned.shape[1] - given.shape[1]
        return returned if more < 0 else torch.cat([given, given.new_ones(len(given), more)], dim=1)
    of_tokens = places != IGNORE_INDEX
    positions = torch.arange(places.shape[1], device=places.device)
    last = (of_tokens * positions).amax(dim=1, keepdim=True)
    # Behind a row's last token lies what makes rows as long as each other; it has counted that rightly.
    of_features = returned.masked_fill(positions <= last, 1)
    return torch.where(of_tokens, given.gather(1, places.clamp(min=0)).to(returned.dtype), of_features)


def _pictures_of_the_towers_size(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def initialize_vision_modules(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self, "get_vision_tower"):  # a fork may have towers of other names
            tower = self.get_vision_tower()
            take_size_of(tower, getattr(tower, "image_processor", None))

    return initialize_vision_modules


def _moved(labels: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor | None:
    """Labels [B, tokens] in the new sequence [B, S], whose positions come from `places`, or from no token."""
    if labels is None:
        return None
    moved = labels.gather(1, places.clamp(min=0))
    return moved.masked_fill(places == IGNORE_INDEX, IGNORE_INDEX)


PATCHES = (
    Patch(
        "llava.model.llava_arch:torch",
        kind=FAULT,
        why="torch.load runs the code that a file holds, before PyTorch 2.6 unless it is told not to",
        replace=TensorsOnly,
    ),
    Patch(
        "llava.model.llava_arch:LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal",
        kind=METHOD,
        why="the mask and the labels of the sequence that the layers see, image features included, first exist here",
        replace=_tell_routing_scope,
        parameters=("input_ids", "attention_mask", "labels"),
    ),
    Patch(
        "llava.model.llava_arch:LlavaMetaModel.initialize_vision_modules",
        kind=FAULT,
        why="some LLaVAs stretch the tower's positions to larger pictures, and leave its image processor as it was",
        replace=_pictures_of_the_towers_size,
    ),
    Patch(
        "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM.forward",
        kind=FAULT,
        why="LLaVA of 2023 puts images in also where it is given the embeddings of a sequence, which it then forgets",
        replace=_keep_given_embeddings,
    ),
)
