"""Asks a LLaVA model the held-out questions, and counts which factors it uses for each task."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mixlora.evaluation.answering import answer as ask
from llava_mixlora.evaluation.questions import Question
from llava_mixlora.inference.loading import Loaded

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


def answer(loaded: Loaded, questions: list[dict[str, Any]], image_folder: Path, batch_size: int = 50) -> Answers:
    """Answer every question; `loaded` is the tokenizer, model and image processor of `load_pretrained_model`."""
    result = Answers(tasks=list(dict.fromkeys(question["task"] for question in questions)))
    asked = [
        Question(str(number), question["task"], question["question"], Path(image_folder) / question["image"])
        for number, question in enumerate(questions)
    ]
    for batch, texts in ask(loaded, asked, CONVERSATION, batch_size, LONGEST_ANSWER):
        result.texts += [text.lower() for text in texts]
        _count_factors(loaded[1], [result.tasks.index(question.task) for question in batch], result)
    return result


def _count_factors(model: Any, tasks: list[int], result: Answers) -> None:
    if not hasattr(model, "peft_config"):
        return
    rows = torch.tensor(tasks).unsqueeze(1)
    for name, route in model.base_model.routes().items():
        E = model.peft_config["default"].num_factors
        usage = result.usage.setdefault(name, torch.zeros(2, len(result.tasks), E, dtype=torch.int64))
        for counts, index in zip(usage, (route.index_A.cpu(), route.index_B.cpu())):
            counts.index_put_((rows.expand_as(index), index), torch.tensor(1), accumulate=True)
