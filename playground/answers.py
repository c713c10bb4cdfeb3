"""Asks a LLaVA model the held-out questions: greedy decoding in left-padded batches, through upstream's own code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CONVERSATION = "llava_v1"  # what `llava.serve.cli` takes for a model whose name has "v1" in it
LONGEST_ANSWER = 16  # tokens


@dataclass
class Answers:
    """The model's answers to a list of questions, and which factors each task used.

    Attributes:
        texts: one answer per question, in their order, lower case.
        usage: by adapted layer, int64 [2, tasks, E]: how often a task chose each factor of pool A and of pool B.
            Empty for a model without adapters. The tasks are in the order of `tasks`.
        tasks: the names of the tasks, in order of appearance.
    """

    texts: list[str] = field(default_factory=list)
    usage: dict[str, Tensor] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)


def read_questions(path: Path, per_task: int | None = None) -> list[dict[str, Any]]:
    """The questions of `heldout.json` as `task`, `image`, `question` and `truth`; at most `per_task` of each task."""
    questions, counts = [], defaultdict(int)
    for sample in json.loads(Path(path).read_text(encoding="utf-8")):
        counts[sample["task"]] += 1
        if per_task is None or counts[sample["task"]] <= per_task:
            asked, told = (turn["value"] for turn in sample["conversations"])
            question = asked.removeprefix("<image>\n")
            questions.append({"task": sample["task"], "image": sample["image"], "question": question, "truth": told})
    return questions


def answer(
    loaded: tuple[Any, Any, Any], questions: list[dict[str, Any]], image_folder: Path, batch_size: int = 50
) -> Answers:
    """Answer every question; `loaded` is the tokenizer, model and image processor of `load_pretrained_model`."""
    tokenizer, model, image_processor = loaded
    model.config.tokenizer_padding_side = "left"  # where LLaVA pads a batch after it has put the images in
    result = Answers(tasks=list(dict.fromkeys(question["task"] for question in questions)))
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    for batch in tqdm(batches, desc="Answering", unit="batch"):
        prompts = [_prompt_ids(question["question"], tokenizer) for question in batch]
        images = [Image.open(Path(image_folder) / question["image"]).convert("RGB") for question in batch]
        input_ids, attention_mask = _left_padded(prompts, tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                images=process_images(images, image_processor, model.config).to(model.device, model.dtype),
                do_sample=False,
                max_new_tokens=LONGEST_ANSWER,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        result.texts += [text.strip().lower() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
        _count_factors(model, [result.tasks.index(question["task"]) for question in batch], result)
    return result


def _prompt_ids(question: str, tokenizer: Any) -> Tensor:
    conversation = conv_templates[CONVERSATION].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question}")
    conversation.append_message(conversation.roles[1], None)
    return tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")


def _left_padded(rows: Iterable[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    reverse = [row.flip(0) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(reverse, batch_first=True, padding_value=padding).flip(1)
    lengths = torch.tensor([len(row) for row in reverse])
    return input_ids, torch.arange(input_ids.shape[1]).flip(0) < lengths.unsqueeze(1)


def _count_factors(model: Any, tasks: list[int], result: Answers) -> None:
    if not hasattr(model, "peft_config"):
        return
    rows = torch.tensor(tasks).unsqueeze(1)
    for name, route in model.base_model.routes().items():
        E = model.peft_config["default"].num_factors
        usage = result.usage.setdefault(name, torch.zeros(2, len(result.tasks), E, dtype=torch.int64))
        for counts, index in zip(usage, (route.index_A.cpu(), route.index_B.cpu())):
            counts.index_put_((rows.expand_as(index), index), torch.tensor(1), accumulate=True)
