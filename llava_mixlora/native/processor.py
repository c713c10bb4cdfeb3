"""Tokenizer, image processing and chat template of a LLaVA, as transformers' `LlavaProcessor` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoProcessor, AutoTokenizer

from ..errors import MixLoraError
from ..inputs import read_json
from ..llava_package import part
from .chat_template import IMAGE, chat_template
from .form import FEATURES

TEMPLATE = "v1"
"""The conversation template where nothing tells another: LLaVA 1.5's."""
PROCESSOR = "LlavaProcessor"
IMAGE_PROCESSING, PROCESSING = "preprocessor_config.json", "processor_config.json"
TOKENIZING = "tokenizer_config.json"
TRAINING_TEMPLATE = "training_template.jinja"
"""The chat template for training, which TRL takes as `chat_template_path`."""
QUESTIONS = ("What is shown?", "And what is beside it? Answer in one word.", " Two  blanks, a line\nand 1234 ünïcodé.")


@dataclass(frozen=True)
class ImageToken:
    """What stands for an image's features in a sequence.

    `token_id`: its id. `rows`: how many token embeddings the model needs. `like`: the token whose row further ones are
    copies of.
    """

    token_id: int
    rows: int
    like: int


def image_token_of(tokenizer: Any, rows: int) -> ImageToken:
    """Give a tokenizer the token `<image>`, where it has none. `rows`: of the model's token embeddings."""
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    like = next(found for found in (tokenizer.unk_token_id, tokenizer.pad_token_id, 0) if found is not None)
    return ImageToken(token_id, max(rows, token_id + 1), like)


def write_processor(
    source: Path, tower: Path, config: Mapping[str, Any], patch_size: int, template: str, folder: Path, rows: int
) -> ImageToken:
    """Write what `AutoProcessor` reads into `folder`.

    Args:
        source: the folder of the tokenizer.
        tower: that of the vision tower, which says how images are prepared.
        config: what the LLaVA's `config.json` says.
        patch_size: of the vision tower, in pixels.
        template: by its name in `llava.conversation.conv_templates`.
        rows: of the model's token embeddings.

    Raises:
        MixLoraError: the tokenizer or the tower's image processing is missing, or the template cannot be one.
    """
    tokenizer = _tokenizer(source)
    token = image_token_of(tokenizer, rows)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    of_tokenizer = {**read_json(folder / TOKENIZING), "processor_class": PROCESSOR, "padding_side": "left"}
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    for name, training in (("chat_template.jinja", False), (TRAINING_TEMPLATE, True)):
        try:
            jinja = chat_template(_conversation(template), _image_text(config), training, begins)
        except MixLoraError as error:
            raise MixLoraError(f"conversation template {template}: {error}") from None
        (folder / name).write_text(jinja, encoding="utf-8")
    of_processor = {
        "processor_class": PROCESSOR,
        "patch_size": patch_size,
        "vision_feature_select_strategy": FEATURES[config.get("mm_vision_select_feature", "patch")],
        "num_additional_image_tokens": 1,  # CLIP's class token, of which "default" takes the feature away again
        "image_token": IMAGE,
    }
    images = _image_processing(tower, config)
    for name, contents in ((TOKENIZING, of_tokenizer), (IMAGE_PROCESSING, images), (PROCESSING, of_processor)):
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return token


def check_prompts(folder: Path, source: Path, config: Mapping[str, Any], template: str, features: int) -> None:
    """Compare prompts of the processor in `folder` with upstream's, texts and tokens.

    Args:
        source: the folder of upstream's tokenizer.
        config: what the LLaVA's `config.json` says.
        template: as in [`write_processor`].
        features: places of the sequence that an image takes.

    Raises:
        MixLoraError: they differ, so that the model would be asked otherwise than it was trained.
    """
    tokenizer_image_token = part("llava.mm_utils:tokenizer_image_token")
    processor, upstream = AutoProcessor.from_pretrained(folder), _tokenizer(source)
    token = processor.image_token_id
    for turns in range(1, len(QUESTIONS) + 1):
        prompt, messages = _prompt(template, QUESTIONS[:turns], _image_text(config))
        made = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if made != prompt:
            raise MixLoraError(f"the chat template of {template} says {made!r:.500}, and LLaVA {prompt!r:.500}")
        ids = tokenizer_image_token(prompt, upstream, token)
        wanted = list(chain.from_iterable([each] * (features if each == token else 1) for each in ids))
        found = processor.tokenizer(made.replace(IMAGE, IMAGE * features)).input_ids
        if found != wanted:
            place = next((n for n, (one, other) in enumerate(zip(found, wanted)) if one != other), len(wanted))
            near = [processor.tokenizer.convert_ids_to_tokens(each[place : place + 3]) for each in (found, wanted)]
            raise MixLoraError(
                f"{source}: its tokenizer, as transformers' processor uses it, gives {near[0]} at token {place} of a "
                f"prompt where upstream's LLaVA gives {near[1]}; such a tokenizer cannot be exported"
            )


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, use_fast=False)  # as upstream's loader does


def _image_text(config: Mapping[str, Any]) -> str:
    return f"<im_start>{IMAGE}<im_end>" if config.get("mm_use_im_start_end") else IMAGE


def _prompt(template: str, questions: Sequence[str], image: str) -> tuple[str, list[dict[str, Any]]]:
    """A conversation about one image whose last question is open: upstream's text of it, and its messages."""
    conversation, messages = _conversation(template), []
    for number, question in enumerate(questions, start=1):
        asked, answer = (
            f"{image}\n{question}" if number == 1 else question,
            None if number == len(questions) else "Yes.",
        )
        conversation.append_message(conversation.roles[0], asked)
        conversation.append_message(conversation.roles[1], answer)
        images = [{"type": "image"}] if number == 1 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return conversation.get_prompt(), messages


def _conversation(template: str) -> Any:
    conv_templates = part("llava.conversation:conv_templates")
    if template not in conv_templates:
        raise MixLoraError(
            f"--version {template}: LLaVA has no such template; expected one of {', '.join(conv_templates)}"
        )
    return conv_templates[template].copy()


def _image_processing(tower: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's, with upstream's padding to a square where the LLaVA was trained so."""
    file = tower / IMAGE_PROCESSING
    if not file.is_file():
        raise MixLoraError(f"vision tower {tower}: it has no {IMAGE_PROCESSING}; copy it again")
    pads = config.get("image_aspect_ratio") == "pad"
    kept = {name: value for name, value in read_json(file).items() if name != "feature_extractor_type"}
    if isinstance(kept.get("size"), int):
        kept["size"] = {"shortest_edge": kept["size"]}
    if isinstance(kept.get("crop_size"), int):
        kept["crop_size"] = {"height": kept["crop_size"], "width": kept["crop_size"]}
    kind = "LlavaImageProcessor" if pads else "CLIPImageProcessor"
    return {**kept, "image_processor_type": kind, "do_pad": pads, "processor_class": PROCESSOR}
