"""Trains and asks adapters of the tiny LLaVA many times over, quickly: in one process, each picture looked at once.

Model, data code and loss are upstream's. Only the frozen tower's features are made once and kept, the system prompt,
half of the tokens and the same for all, is left out, and answers are not generated but checked in one forward pass:
greedy decoding gives an answer to the letter exactly if each of its tokens, the end included, is the likeliest after
those before it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

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


class TinyLlava:
    """The LLaVA in a folder, whose tower looks at each picture in `image_folder` once."""

    def __init__(self, base: Path, image_folder: Path) -> None:
        self.image_folder = image_folder
        self.loaded: Loaded = load_for_inference(base)
        self._features: dict[str, Tensor] = {}

    def features(self, picture: str, pixels: Tensor) -> Tensor:
        """What the tower makes of a picture, [patches, width]; `pixels` [3, height, width]."""
        if picture not in self._features:
            with torch.no_grad():
                self._features[picture] = self.loaded[1].get_vision_tower()(pixels.unsqueeze(0))[0]
        return self._features[picture]

    def adapted(self, config: PeftConfig, seed: int) -> PeftModel:
        """A fresh adapter around the language model of a fresh base; nothing else learns."""
        model = copy.deepcopy(self.loaded[1]).requires_grad_(False)
        model.get_model().vision_tower = Seen()
        config.exclude_modules = r".*mm_projector.*"
        torch.manual_seed(seed)
        return get_peft_model(model, config)


class Seen(nn.Module):
    """Stands in for a tower: it is given features instead of pixels."""

    def forward(self, features: Tensor) -> Tensor:
        """`features` [B, patches, width], as they are."""
        return features


class Items:
    """Samples as upstream's data set gives them, each made when it is first needed."""

    def __init__(self, llava: TinyLlava, samples: Sequence[Sample]) -> None:
        self.llava, self.samples = llava, samples
        _add_template()
        self._dataset, self._collate = training_data(list(samples), llava.loaded, llava.image_folder, WITHOUT_SYSTEM)
        self._made: dict[int, dict[str, Tensor]] = {}

    def batch(self, numbers: Iterable[int]) -> Batch:
        """LLaVA's inputs of these samples, `images` being the tower's features [B, patches, width]."""
        return self._collate([self._item(number) for number in numbers])

    def _item(self, number: int) -> dict[str, Tensor]:
        if number not in self._made:
            item = self._dataset[number]
            item["image"] = self.llava.features(self.samples[number]["image"], item["image"])
            self._made[number] = item
        return self._made[number]


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


def train(model: PeftModel, items: Items, steps: Sequence[Sequence[int]], learning_rate: float) -> None:
    """One AdamW step for each of `steps`, the numbers of its samples, on a cosine schedule; none for an empty one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * len(steps)), len(steps))
    model.train()
    for numbers in steps:
        if numbers:
            model(**items.batch(numbers)).loss.backward()
            nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()  # which leaves parameters without a gradient as they are
        optimizer.zero_grad()
        schedule.step()


def accuracy(model: PeftModel, items: Items) -> dict[str, float]:
    """The share of right answers in percent, by task."""
    hits: dict[str, list[bool]] = {}
    for sample, hit in zip(items.samples, right(model, items)):
        hits.setdefault(sample["task"], []).append(hit)
    return {task: round(100 * sum(of_task) / len(of_task), 2) for task, of_task in hits.items()}


def right(model: PeftModel, items: Items) -> list[bool]:
    """Which of the samples greedy decoding would answer to the letter."""
    model.eval()
    _route_on_the_prompt(model)
    found: list[bool] = []
    for start in range(0, len(items.samples), ASKED_AT_A_TIME):
        numbers = range(start, min(start + ASKED_AT_A_TIME, len(items.samples)))
        inputs = with_images(model, items.batch(numbers))
        with torch.inference_mode():
            predicted = model(**inputs).logits[:, :-1].argmax(dim=-1)
        labels = inputs["labels"][:, 1:]
        found += ((predicted == labels) | (labels == IGNORE_INDEX)).all(dim=1).tolist()
    return found


def _route_on_the_prompt(model: PeftModel) -> None:
    """Route as generation does, which sees no answer, whatever positions the routers averaged in training."""
    for layer in model.modules():
        if isinstance(layer, MixLoraLayer):
            for adapter, settings in layer.settings.items():
                layer.settings[adapter] = replace(settings, router_scope="prompt")
