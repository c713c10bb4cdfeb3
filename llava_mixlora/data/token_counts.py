"""How many tokens of a sample reach the model, and how many of them teach it something, as LLaVA itself prepares it."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..llava_package import TRAIN, part
from .answers import answer_mark, answers_alone
from .conversations import IMAGE, Sample, Unusable, images_of

WITHOUT_TEMPLATE = ("v0", "v0.5")
"""Values of `--version` with which upstream keeps the template that it has."""
UNLIMITED = 1 << 30
WORDS = 200_000
"""Words whose tokens are remembered; some 30 MB."""
MARGIN = 1.1
"""Words in a text may fall into other tokens than by themselves; by less than that."""


@dataclass(frozen=True)
class Count:
    """Tokens of one sample, features of its image included, and those that are supervised within the limit."""

    tokens: int
    supervised: int


def expanded_places(is_image: Tensor, image_tokens: int) -> Tensor:
    """Where each token begins in the sequence that the model sees, with the features of images in it.

    Args:
        is_image: whether a token stands for an image [..., T], bool.
        image_tokens: features of one image.

    Returns:
        Places [..., T], int64, as `prepare_inputs_labels_for_multimodal` comes to.
    """
    images_before = is_image.cumsum(-1) - is_image.long()
    return torch.arange(is_image.shape[-1], device=is_image.device) + (image_tokens - 1) * images_before


@dataclass
class TokenCounter:
    """Counts by the run's own tokenizer and template. LLaVA has to be importable (see [`patches.apply`]).

    Args:
        tokenizer: as upstream loads it for training, with its `model_max_length` and its padding token.
        version: the conversation template, as `--version`.
        image_tokens: features of an image in the sequence.
        marks_ends: whether an image stands between tokens of its own (`--mm_use_im_start_end`).
    """

    tokenizer: Any
    version: str
    image_tokens: int
    marks_ends: bool = False

    @property
    def limit(self) -> int:
        """Tokens that a sample may have, `--model_max_length`; what lies behind is cut off."""
        return self.tokenizer.model_max_length

    def surely_fits(self, sample: Sample) -> bool:
        """Whether a sample fits by far, and holds nothing that LLaVA's preparation stumbles over.

        Told from the tokens of its words, each counted once: a hundred times as fast as preparing it.
        """
        size = self._overhead + self.image_tokens * len(images_of(sample))
        for turn in sample["conversations"]:
            text = turn["value"]
            if self._stumbling_block.search(text) or (self._has_unknown and not text.isascii()):
                return False
            words = text.split()
            size += self._overhead_of_a_turn + sum(map(self._word_sizes.__getitem__, words))
            size += len(text) - sum(map(len, words))  # white space, of which a single blank is part of the next word
        return MARGIN * size <= self.limit

    def count(self, sample: Sample) -> Count:
        """Prepare a sample as upstream's data set and model do.

        Raises:
            Unusable: nothing of it is supervised, with the reason.
        """
        tokens, supervised = self._counted(sample)
        if "image" not in sample and tokens >= self.limit:  # upstream's tokenizer has cut the text
            with self._limit_of(UNLIMITED):
                tokens, _ = self._counted(sample)
        if supervised:
            return Count(tokens, supervised)
        if tokens > self.limit:
            images = self.image_tokens * len(images_of(sample))
            image = f", {images} of them of its image" if images else ""
            raise Unusable(
                "cut off before its answer",
                f"{tokens} tokens{image}, of which --model_max_length {self.limit} leaves none to learn",
            )
        for turn in sample["conversations"]:
            if mark := self._stumbling_block.search(turn["value"]):
                raise Unusable(
                    "a mark of the template in the text",
                    f"its text has {mark[0]!r}, by which the template {self.version} and the tokenizer tell turns "
                    "apart; LLaVA learns nothing of it",
                )
        raise Unusable(
            "LLaVA finds no answer in it",
            f"with the template {self.version} and this tokenizer LLaVA loses count of its turns (tokenization "
            "mismatch) and learns nothing of it; is --version that of the base?",
        )

    def _counted(self, sample: Sample) -> tuple[int, int]:
        constants = part("llava.constants")
        turns = [copy.deepcopy(sample["conversations"])]
        with self._template(), contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each mismatch
            try:
                if "image" in sample:
                    how = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=self.marks_ends)
                    turns = part(f"{TRAIN}:preprocess_multimodal")(turns, how)
                prepared = part(f"{TRAIN}:preprocess")(turns, self.tokenizer, has_image="image" in sample)
            except Exception as error:
                raise Unusable(
                    "LLaVA cannot prepare it", f"LLaVA cannot prepare it ({type(error).__name__}: {error})"
                ) from error
        ids, labels = (torch.as_tensor(prepared[name][0]) for name in ("input_ids", "labels"))
        labels = answers_alone(ids[None], labels[None], self._answer_mark, constants.IGNORE_INDEX)[0]
        places = expanded_places(ids == constants.IMAGE_TOKEN_INDEX, self.image_tokens)
        tokens = len(ids) + (self.image_tokens - 1) * int((ids == constants.IMAGE_TOKEN_INDEX).sum())
        return tokens, int(((labels != constants.IGNORE_INDEX) & (places < self.limit)).sum())

    @cached_property
    def _answer_mark(self) -> Tensor | None:
        with self._template():
            return answer_mark(self.tokenizer)

    @contextmanager
    def _template(self) -> Iterator[None]:
        conversation = part("llava.conversation")
        before = conversation.default_conversation
        if self.version not in WITHOUT_TEMPLATE:
            templates = conversation.conv_templates
            conversation.default_conversation = templates.get(self.version) or templates.get("vicuna_v1", before)
        try:
            yield
        finally:
            conversation.default_conversation = before

    @contextmanager
    def _limit_of(self, limit: int) -> Iterator[None]:
        before, self.tokenizer.model_max_length = self.tokenizer.model_max_length, limit
        try:
            yield
        finally:
            self.tokenizer.model_max_length = before

    @cached_property
    def _marks(self) -> list[str]:
        conversation = part("llava.conversation")
        with self._template():
            template = conversation.default_conversation
        roles = [f"{role}: " for role in template.roles]
        found = [template.sep, template.sep2, *roles, "[INST]", "[/INST]", *self.tokenizer.all_special_tokens]
        return [mark for mark in dict.fromkeys(found) if mark and mark.strip() and mark != IMAGE]

    @cached_property
    def _stumbling_block(self) -> re.Pattern[str]:
        # White space at the edges melts into the template's, differently in a part than in the whole.
        return re.compile("|".join([r"\A\s", r"\s\Z", *map(re.escape, self._marks)]))

    @cached_property
    def _overhead(self) -> int:
        """At least as many tokens as the template puts in front of the first turn."""
        conversation = part("llava.conversation")
        with self._template():
            return len(self.tokenizer(conversation.default_conversation.system).input_ids) + 16

    @cached_property
    def _overhead_of_a_turn(self) -> int:
        """At least as many tokens as the template adds for each turn."""
        conversation = part("llava.conversation")
        with self._template():
            template = conversation.default_conversation
        return 2 * max(len((text or "").encode()) for text in (*template.roles, template.sep, template.sep2)) + 8

    @cached_property
    def _word_sizes(self) -> dict[str, int]:
        return _WordSizes(self.tokenizer)

    @cached_property
    def _has_unknown(self) -> bool:
        """Whether some characters become the unknown token, which LLaVA takes for padding."""
        ids = self.tokenizer("\U0010fffd\ue000").input_ids
        return self.tokenizer.unk_token_id in ids


class _WordSizes(dict):
    """Tokens of a word by itself, its begin-of-sequence token included; of words beyond [`WORDS`] its bytes."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS:
            return len(word.encode())
        size = self[word] = len(self.tokenizer(word).input_ids)
        return size
