"""Conversations as upstream's LLaVA reads them: its template, its tokens, its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.chat_prompt import answered_tokens
from ..evaluation.answering import ids_of, image_mark, left_padded, pixels_of, takes_image_sizes, template_for
from ..inference.loading import Loaded
from ..llava_package import part
from .answer_text import byte_tokens
from .chat import Message
from .request_error import RequestError

EMPTY = Image.new("RGB", (16, 16))
"""In the place of a picture where other prompts of a batch have one; LLaVA leaves its features out."""


@dataclass(frozen=True)
class Prompt:
    """One conversation.

    `ids`: int64 [S], -200 for a picture. `answered`: bool [S], True at what the assistant has said; None where it has
    said nothing. `length`: tokens, those of the pictures' features among them.
    """

    ids: Tensor
    pictures: tuple[Image.Image, ...]
    answered: Tensor | None
    length: int
    questions: int


class Prompts:
    """How a model is asked.

    Args:
        loaded: tokenizer, model and image processor.
        conversation: the template of its training, by upstream's name.
    """

    def __init__(self, loaded: Loaded, conversation: str) -> None:
        self.loaded, self.conversation = loaded, conversation
        tokenizer, model, self._image_processor = loaded
        config = model.config
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.padded = getattr(config, "image_aspect_ratio", None) == "pad"
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self.bytes_ = byte_tokens(tokenizer)
        self.ends = tuple({end for end in (*ends, tokenizer.eos_token_id) if end is not None})

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """A conversation's prompt, for the assistant to go on with.

        Raises:
            RequestError: it has pictures, and the model sees none.
        """
        pictures = tuple(picture for message in messages for picture in message.pictures)
        if pictures and self._image_processor is None:
            raise RequestError("the model sees no images; send text alone", "messages")
        text = self._text(messages)
        ids = ids_of(text, self.loaded)
        features = self._features() if pictures else 0
        has_answers = any(message.role == "assistant" for message in messages)
        answered = answered_tokens(text, self.loaded[0]) if has_answers else None
        answered = None if answered is None else answered[0][-len(ids) :]
        questions = sum(message.role == "user" for message in messages)
        return Prompt(ids, pictures, answered, len(ids) + len(pictures) * (features - 1), questions)

    def as_seen(self, picture: Image.Image) -> Image.Image:
        """The picture as the tower gets it, in its size and with 8 bits: other programs scale with other roundings."""
        if self.padded:
            background = tuple(int(mean * 255) for mean in self._image_processor.image_mean)
            picture = part("llava.mm_utils:expand2square")(picture, background)
        scaled = self._image_processor.preprocess(picture, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(scaled["pixel_values"][0])
        return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def _text(self, messages: Sequence[Message]) -> str:
        template = template_for(self.conversation, self.loaded)
        for message in messages:
            if message.role == "system":
                template.system = message.text
            else:
                role = template.roles[message.role == "assistant"]
                template.append_message(role, f"{image_mark(self.loaded)}\n" * len(message.pictures) + message.text)
        template.append_message(template.roles[1], None)
        return template.get_prompt()

    def _features(self) -> int:
        """Of a picture; of one in tiles those of the whole, which is the least."""
        return self.loaded[1].get_vision_tower().num_patches


def inputs_of(loaded: Loaded, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], Tensor | None]:
    """What the model takes of B prompts, on its device, and bool [B, S] where the assistant has spoken, if anywhere."""
    tokenizer, model, image_processor = loaded
    input_ids, attention_mask = left_padded([prompt.ids for prompt in prompts], tokenizer.pad_token_id or 0)
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    if any(prompt.pictures for prompt in prompts):
        pictures = [picture for prompt in prompts for picture in prompt.pictures or (EMPTY,)]
        inputs["images"] = pixels_of(pictures, image_processor, model)
        if takes_image_sizes(model):
            inputs["image_sizes"] = [picture.size for picture in pictures]
    answered = None
    if any(prompt.answered is not None for prompt in prompts):
        answered = torch.zeros(input_ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if prompt.answered is not None:
                answered[row, -len(prompt.ids) :] = prompt.answered
        answered = answered.to(model.device)
    return inputs, answered
