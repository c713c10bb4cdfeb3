"""Asks a LLaVA model questions: greedy decoding in left-padded batches, through upstream's own code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.images import open_image
from ..errors import MixLoraError
from ..inference.loading import Loaded
from ..llava_package import part
from .questions import Question

TEMPLATES = "llava.conversation:conv_templates"


def answer(
    loaded: Loaded,
    questions: Sequence[Question],
    conversation: str = "llava_v1",
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: bool = True,
) -> Iterator[tuple[Sequence[Question], list[str]]]:
    """Answer questions in their order; gives each batch with its answers as soon as it is done.

    A row's answer does not depend on the rest of its batch: padding is masked, and MixLoRA's routes are those of the
    row alone.

    Args:
        loaded: tokenizer, model and image processor of `load_pretrained_model`.
        conversation: the template, as `--conv-mode` of upstream's evaluation programs.
        batch_size: questions that are answered at a time.
        max_new_tokens: the longest answer.
        progress: show a progress bar.

    Raises:
        MixLoraError: there is no such template, or an image is damaged.
    """
    tokenizer, model, _ = loaded
    padded = getattr(model.config, "image_aspect_ratio", None) == "pad"
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    for batch in tqdm(batches, desc="Answering", unit="batch", disable=not progress):
        pictures = [open_image(question.image, padded) for question in batch]
        inputs = inputs_of(loaded, [question.prompt for question in batch], pictures, conversation)
        input_ids = inputs.pop("input_ids")
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        if len(output) != len(batch):
            raise MixLoraError(
                f"{part('llava.model.llava_arch').__name__} gave {len(output)} answers to {len(batch)} questions; ask "
                "one at a time, with --batch-size 1"
            )
        prompts = input_ids.to(output.device)
        if output.shape[1] >= prompts.shape[1] and torch.equal(output[:, : prompts.shape[1]], prompts):
            output = output[:, prompts.shape[1] :]  # LLaVA of 2023 gives the prompt back, with its image tokens
        yield batch, [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def inputs_of(
    loaded: Loaded, questions: Sequence[str], pictures: list[Image.Image], conversation: str
) -> dict[str, Any]:
    """What the model takes of B questions, each about its picture, on its device.

    Returns:
        `input_ids` int64 [B, S] and `attention_mask` bool [B, S], padded on the left; `images`, and `image_sizes` if it
        takes them.
    """
    tokenizer, model, image_processor = loaded
    rows = [_prompt_ids(question, conversation, loaded) for question in questions]
    input_ids, attention_mask = left_padded(rows, tokenizer.pad_token_id or 0)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        "images": pixels_of(pictures, image_processor, model),
        **({"image_sizes": [picture.size for picture in pictures]} if takes_image_sizes(model) else {}),
    }


def takes_image_sizes(model: Any) -> bool:
    """Whether images are given with their sizes: to LLaVA's own generate() or, where it has none, to its forward()."""
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    return any("image_sizes" in inspect.signature(method).parameters for method in (llava.generate, llava.forward))


def check_conversation(name: str, flag: str = "--conv-mode") -> None:
    """Refuse a conversation template that upstream does not have."""
    conv_templates = part(TEMPLATES)
    if name not in conv_templates:
        raise MixLoraError(f"{flag} {name}: no such template; expected one of {', '.join(conv_templates)}")


def _prompt_ids(question: str, conversation: str, loaded: Loaded) -> Tensor:
    turns = template_for(conversation, loaded)
    turns.append_message(turns.roles[0], f"{image_mark(loaded)}\n{question}")
    turns.append_message(turns.roles[1], None)
    return ids_of(turns.get_prompt(), loaded)


def image_mark(loaded: Loaded) -> str:
    """What stands in a prompt for a picture."""
    constants = part("llava.constants")
    if getattr(loaded[1].config, "mm_use_im_start_end", False):
        return constants.DEFAULT_IM_START_TOKEN + constants.DEFAULT_IMAGE_TOKEN + constants.DEFAULT_IM_END_TOKEN
    return constants.DEFAULT_IMAGE_TOKEN


def template_for(conversation: str, loaded: Loaded) -> Any:
    """A conversation template by upstream's name, for messages to be appended."""
    turns = part(TEMPLATES)[conversation].copy()
    if hasattr(turns, "tokenizer"):  # of a template in a fork, which asks a tokenizer for it and loses it in a copy
        turns.tokenizer = loaded[0]
    return turns


def ids_of(prompt: str, loaded: Loaded) -> Tensor:
    """Token ids of a prompt as int64 [S], upstream's number for an image (-200) among them."""
    tokenizer = loaded[0]
    constants, tokenize = part("llava.constants"), part("llava.mm_utils:tokenizer_image_token")
    ids = tokenize(prompt, tokenizer, constants.IMAGE_TOKEN_INDEX, return_tensors="pt")
    # Such a template begins with the token that the tokenizer puts in front again, and training has once.
    is_doubled = len(ids) > 1 and tokenizer.bos_token_id is not None and (ids[:2] == tokenizer.bos_token_id).all()
    return ids[1:] if is_doubled else ids


def pixels_of(pictures: list[Image.Image], image_processor: Any, model: Any) -> Any:
    """What the model sees of pictures: a tensor [B, 3, height, width], or a list of tiles if their numbers differ."""
    pixels = part("llava.mm_utils:process_images")(pictures, image_processor, model.config)
    if isinstance(pixels, list):  # of several tiles each, whose numbers differ
        return [tiles.to(model.device, model.dtype) for tiles in pixels]
    return pixels.to(model.device, model.dtype)


def left_padded(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids as int64 [B, S] with `padding` on the left, and bool [B, S], False there."""
    reverse = [row.flip(0) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(reverse, batch_first=True, padding_value=padding).flip(1)
    lengths = torch.tensor([len(row) for row in reverse])
    return input_ids, torch.arange(input_ids.shape[1]).flip(0) < lengths.unsqueeze(1)
