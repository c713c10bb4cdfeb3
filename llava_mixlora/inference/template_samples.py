"""Conversations as a LLaVA without a training program would train on them, prepared by its template and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data.conversations import HUMAN, Sample
from ..data.images import open_image
from ..llava_package import part
from ..method.model_inputs import IGNORE_INDEX
from .loading import Loaded


@dataclass
class TemplateSamples(Dataset):
    """Items `input_ids` and `labels` [T], the answers' tokens supervised, and `image` [3, height, width].

    Args:
        samples: in LLaVA's form.
        loaded: tokenizer, model and image processor.
        image_folder: where images lie.
        version: name of the conversation template.
    """

    samples: Sequence[Sample]
    loaded: Loaded
    image_folder: str | Path | None
    version: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self.samples[number]
        messages = [(turn["from"] == HUMAN, self._with_image_first(turn["value"])) for turn in sample["conversations"]]
        tokens = self._tokens(messages)
        labels = [IGNORE_INDEX] * len(tokens)
        for place, (is_question, _) in enumerate(messages):
            if not is_question:
                # The template itself says where an answer begins and ends: what it makes with and without it.
                begin = _agreeing(self._tokens([*messages[:place], (False, None)]), tokens)
                end = _agreeing(self._tokens(messages[: place + 1]), tokens)
                labels[begin:end] = tokens[begin:end]
        most = self.loaded[0].model_max_length
        item = {"input_ids": torch.tensor(tokens[:most]), "labels": torch.tensor(labels[:most])}
        return {**item, "image": self._pixels(sample)}

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """A batch [B, T] of items, padded on the right, as upstream's data collators make one."""
        padding = self.loaded[0].pad_token_id or 0
        rows = [item["input_ids"] for item in items]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=padding)
        labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX)
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        images = [item["image"] for item in items]
        if all(image.shape == images[0].shape for image in images):
            images = torch.stack(images)
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "images": images}

    def _tokens(self, messages: Sequence[tuple[bool, str | None]]) -> list[int]:
        turns = part("llava.conversation:conv_templates")[self.version].copy()
        for is_question, text in messages:
            turns.append_message(turns.roles[0 if is_question else 1], text)
        tokenize, constants = part("llava.mm_utils:tokenizer_image_token"), part("llava.constants")
        return tokenize(turns.get_prompt(), self.loaded[0], constants.IMAGE_TOKEN_INDEX)

    def _with_image_first(self, text: str) -> str:
        constants = part("llava.constants")
        image = constants.DEFAULT_IMAGE_TOKEN
        if image not in text:
            return text
        marked = image
        if getattr(self.loaded[1].config, "mm_use_im_start_end", False):
            marked = constants.DEFAULT_IM_START_TOKEN + image + constants.DEFAULT_IM_END_TOKEN
        return f"{marked}\n{text.replace(image, '').strip()}".strip()

    def _pixels(self, sample: Sample) -> Tensor:
        _, model, image_processor = self.loaded
        if "image" not in sample:  # the sequence takes an image for each row, and of this one nothing
            size = image_processor.crop_size
            return torch.zeros(3, size["height"], size["width"])
        padded = getattr(model.config, "image_aspect_ratio", None) == "pad"
        picture = open_image(Path(self.image_folder or "") / sample["image"], padded)
        return part("llava.mm_utils:process_images")([picture], image_processor, model.config)[0]


def _agreeing(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(tokens, others))
    return next((place for place, (one, other) in pairs if one != other), min(len(tokens), len(others)))
