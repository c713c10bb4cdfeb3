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
    tokenizer, model, image_processor = loaded
    takes_sizes = "image_sizes" in _parameters_of_generate(model)
    padding, padded = tokenizer.pad_token_id or 0, getattr(model.config, "image_aspect_ratio", None) == "pad"
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    for batch in tqdm(batches, desc="Answering", unit="batch", disable=not progress):
        input_ids, attention_mask = _left_padded([_prompt_ids(q.prompt, conversation, loaded) for q in batch], padding)
        pictures = [open_image(question.image, padded) for question in batch]
        with torch.inference_mode():
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                images=_pixels(pictures, image_processor, model),
                **({"image_sizes": [picture.size for picture in pictures]} if takes_sizes else {}),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
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


def _parameters_of_generate(model: Any) -> set[str]:
    """What images are given with: LLaVA's own generate() takes it, or, where it has none, its forward()."""
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    return {*inspect.signature(llava.generate).parameters, *inspect.signature(llava.forward).parameters}


def check_conversation(name: str) -> None:
    """Refuse a conversation template that upstream does not have."""
    conv_templates = part(TEMPLATES)
    if name not in conv_templates:
        raise MixLoraError(f"--conv-mode {name}: no such template; expected one of {', '.join(conv_templates)}")


def _prompt_ids(question: str, conversation: str, loaded: Loaded) -> Tensor:
    tokenizer, model, _ = loaded
    constants, tokenize = part("llava.constants"), part("llava.mm_utils:tokenizer_image_token")
    image = constants.DEFAULT_IMAGE_TOKEN
    if getattr(model.config, "mm_use_im_start_end", False):
        image = constants.DEFAULT_IM_START_TOKEN + image + constants.DEFAULT_IM_END_TOKEN
    turns = part(TEMPLATES)[conversation].copy()
    if hasattr(turns, "tokenizer"):  # of a template in a fork, which asks a tokenizer for it and loses it in a copy
        turns.tokenizer = tokenizer
    turns.append_message(turns.roles[0], f"{image}\n{question}")
    turns.append_message(turns.roles[1], None)
    ids = tokenize(turns.get_prompt(), tokenizer, constants.IMAGE_TOKEN_INDEX, return_tensors="pt")
    # Such a template begins with the token that the tokenizer puts in front again, and training has once.
    is_doubled = len(ids) > 1 and tokenizer.bos_token_id is not None and (ids[:2] == tokenizer.bos_token_id).all()
    return ids[1:] if is_doubled else ids


def _pixels(pictures: list[Image.Image], image_processor: Any, model: Any) -> Any:
    pixels = part("llava.mm_utils:process_images")(pictures, image_processor, model.config)
    if isinstance(pixels, list):  # of several tiles each, whose numbers differ
        return [tiles.to(model.device, model.dtype) for tiles in pixels]
    return pixels.to(model.device, model.dtype)


def _left_padded(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    reverse = [row.flip(0) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(reverse, batch_first=True, padding_value=padding).flip(1)
    lengths = torch.tensor([len(row) for row in reverse])
    return input_ids, torch.arange(input_ids.shape[1]).flip(0) < lengths.unsqueeze(1)
