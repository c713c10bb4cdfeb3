"""Trains and asks adapters of the tiny LLaVA many times over, quickly: in one process, each picture looked at once.

Model, data code and loss are upstream's. Only what the frozen tower and projector make of a picture is made once and
kept, the system prompt, half of the tokens and the same for all, is left out, and answers are not generated but checked
in one forward pass: greedy decoding gives an answer to the letter exactly if each of its tokens, the end included, is
the likeliest after those before it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from llava_mixlora.inference.loading import Loaded, load_for_inference
from llava_mixlora.inference.samples import Batch, training_data, with_images
from llava_mixlora.method.layer import MixLoraLayer
from llava_mixlora.method.model_inputs import IGNORE_INDEX
from playground.answers import CONVERSATION

WARMUP = 0.03  # share of the steps
LARGEST_GRADIENT = 1.0
ASKED_AT_A_TIME = 60
WITHOUT_SYSTEM = "llava_v1_without_system"
Sample = dict[str, Any]
"""A conversation in LLaVA's format with its `task`."""
Inputs = Callable[[PeftModel, Batch, Tensor], Batch]
"""What a model is given of a batch, and of the number of each instance's task, int64 [B]."""
Watch = Callable[[int], None]
"""Is called after each step of a training with its number, from 1."""


def without_tasks(model: PeftModel, batch: Batch, tasks: Tensor) -> Batch:
    """The batch alone: what most methods are given."""
    return batch


class TinyLlava:
    """The LLaVA in a folder, whose tower looks at each picture in `image_folder` once."""

    def __init__(self, base: Path, image_folder: Path) -> None:
        self.image_folder = image_folder
        self.loaded: Loaded = load_for_inference(base)
        self._features: dict[str, Tensor] = {}

    def knows(self, picture: str) -> bool:
        """Whether the tower has looked at it."""
        return picture in self._features

    def features(self, picture: str, pixels: Tensor | None = None) -> Tensor:
        """What tower and projector make of a picture, [patches, d_model].

        `pixels` [3, height, width], which are not needed of a picture that it knows.
        """
        if picture not in self._features:
            with torch.no_grad():
                self._features[picture] = self.loaded[1].encode_images(pixels.unsqueeze(0))[0]
        return self._features[picture]

    def fresh(self) -> PreTrainedModel:
        """A copy of the model that is given features in the place of pixels; nothing in it learns."""
        model = copy.deepcopy(self.loaded[1]).requires_grad_(False)
        model.get_model().vision_tower = model.get_model().mm_projector = Seen()
        return model

    def adapted(self, config: PeftConfig, seed: int) -> PeftModel:
        """A fresh adapter around the language model of a fresh base; nothing else learns."""
        torch.manual_seed(seed)
        return get_peft_model(self.fresh(), config)


class Seen(nn.Module):
    """Stands in for tower and projector: it is given features instead of pixels."""

    def forward(self, features: Tensor) -> Tensor:
        """`features` [B, patches, d_model], as they are."""
        return features


class Items:
    """Samples as upstream's data set gives them, each made when it is first needed.

    `tasks` are the names of all tasks, whose order numbers them; by default in the order of the samples.
    """

    def __init__(self, llava: TinyLlava, samples: Sequence[Sample], tasks: Sequence[str] = ()) -> None:
        self.llava, self.samples = llava, samples
        self.tasks = tuple(tasks or dict.fromkeys(sample["task"] for sample in samples))
        self._numbers = {task: number for number, task in enumerate(self.tasks)}
        _add_template()
        self._dataset, self._collate = training_data(list(samples), llava.loaded, llava.image_folder, WITHOUT_SYSTEM)
        self._texts: dict[str, dict[str, Tensor]] = {}

    def batch(self, numbers: Iterable[int]) -> Batch:
        """LLaVA's inputs of these samples, `images` being their features [B, patches, d_model]."""
        return self._collate([self._item(number) for number in numbers])

    def tasks_of(self, numbers: Iterable[int]) -> Tensor:
        """The numbers of these samples' tasks, int64 [B]; -1 for a task that is not among the known ones."""
        return torch.tensor([self._numbers.get(self.samples[number]["task"], -1) for number in numbers])

    def _item(self, number: int) -> dict[str, Tensor]:
        sample = self.samples[number]
        picture, text = sample["image"], json.dumps(sample["conversations"])
        if text not in self._texts or not self.llava.knows(picture):
            item = self._dataset[number]
            self.llava.features(picture, item["image"])
            self._texts[text] = {name: item[name] for name in ("input_ids", "labels")}
        return {**self._texts[text], "image": self.llava.features(picture)}


def _add_template() -> None:
    from llava.conversation import conv_templates

    template = conv_templates[CONVERSATION].copy()
    template.system = ""
    conv_templates[WITHOUT_SYSTEM] = template


def drawn(samples: int, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The numbers of the samples of each step: in random order, epoch after epoch, the same for the same seed."""
    draw, waiting = random.Random(seed), []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += draw.sample(range(samples), samples)
        yield waiting[:batch_size]
        del waiting[:batch_size]


def train(
    model: PeftModel,
    items: Items,
    steps: Sequence[Sequence[int]],
    learning_rate: float,
    inputs: Inputs = without_tasks,
    watch: Watch | None = None,
) -> None:
    """One AdamW step for each of `steps`, the numbers of its samples, on a cosine schedule."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * len(steps)), len(steps))
    for number, step in enumerate(steps, 1):
        model.train()  # again each time: who watches may ask
        model(**inputs(model, items.batch(step), items.tasks_of(step))).loss.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if watch is not None:
            watch(number)


def accuracy(model: PeftModel, items: Items, inputs: Inputs = without_tasks) -> dict[str, float]:
    """The share of right answers in percent, by task."""
    hits: dict[str, list[bool]] = {}
    for sample, hit in zip(items.samples, right(model, items, inputs)):
        hits.setdefault(sample["task"], []).append(hit)
    return {task: round(100 * sum(of_task) / len(of_task), 2) for task, of_task in hits.items()}


def right(model: PeftModel, items: Items, inputs: Inputs = without_tasks) -> list[bool]:
    """Which of the samples greedy decoding would answer to the letter."""
    model.eval()
    _route_on_the_prompt(model)
    found: list[bool] = []
    for start in range(0, len(items.samples), ASKED_AT_A_TIME):
        numbers = range(start, min(start + ASKED_AT_A_TIME, len(items.samples)))
        batch = items.batch(numbers)
        labels = with_images(model, batch)["labels"][:, 1:]
        with torch.inference_mode():
            logits = model(**inputs(model, batch, items.tasks_of(numbers))).logits
        predicted = logits[:, :-1].argmax(dim=-1)
        found += ((predicted == labels) | (labels == IGNORE_INDEX)).all(dim=1).tolist()
    return found


def _route_on_the_prompt(model: PeftModel) -> None:
    """Route as generation does, which sees no answer, also where routers averaged the whole sequence in training."""
    for layer in model.modules():
        if isinstance(layer, MixLoraLayer):
            for adapter, settings in layer.settings.items():
                if settings.router_scope == "sequence":
                    layer.settings[adapter] = replace(settings, router_scope="prompt")
