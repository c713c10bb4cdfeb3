"""Conversations in LLaVA's format as batches for a loaded model, prepared by LLaVA's own data code where it has any."""

from __future__ import annotations

import inspect
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn
from tqdm import tqdm

from ..data.conversations import read_conversations
from ..data.images import check_images
from ..errors import MixLoraError
from ..llava_package import TRAIN, part, used
from ..writing import writing
from .loading import Loaded
from .template_samples import TemplateSamples

Batch = dict[str, Any]
HOW_TO_CUT = ("image_grid_pinpoints", "image_crop_resolution", "image_split_resolution")
"""What a model's configuration and the arguments of its data say, beside `image_aspect_ratio`, of a fork with tiles."""


@dataclass(frozen=True)
class SampleSource:
    """Conversations in LLaVA's format.

    Args:
        data: a JSON file, as `--data_path` of training.
        image_folder: where its images lie.
        task: only samples whose field `"task"` has this value; all when None.
        samples: how many to draw, a tenth of them being held out; all when there are fewer.
        version: the conversation template, as `--version` of training (see [`conversation.conversation_of`]).
        batch_size: how many go through the model at a time.
    """

    data: str
    image_folder: str | None = None
    task: str | None = None
    samples: int = 512
    version: str = "v1"
    batch_size: int = 8


def samples_by_task(data: SampleSource, tasks: Sequence[str] = (), seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """`data.samples` samples of each task, by the task that their field `"task"` names.

    Args:
        data: where from, and how many of each task.
        tasks: which tasks, in this order; all when empty, in the order of the data.
        seed: of the choice of samples.

    Raises:
        MixLoraError: there are fewer than two tasks, or too few samples of one; or no sample has an image, or images
            are missing.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in read_conversations(data.data):
        if "task" in sample:
            found.setdefault(str(sample["task"]), []).append(sample)
    if unknown := [task for task in tasks if task not in found]:
        known = ", ".join(found) or "none: no sample has a field 'task'"
        raise MixLoraError(f"--tasks {' '.join(unknown)}: {data.data} has no samples of it; its tasks are {known}")
    samples = {task: found[task] for task in tasks or found}
    if len(samples) < 2:
        raise MixLoraError(
            f"--data {data.data}: expected samples of two tasks at least, named in a field 'task'; found "
            f"{', '.join(samples) or 'none'}"
        )
    for task, of_task in samples.items():
        if len(of_task) < data.samples:
            raise MixLoraError(
                f"--samples {data.samples}: {data.data} has {len(of_task)} of task {task!r}; ask for fewer"
            )
        random.Random(seed).shuffle(of_task)
    samples = {task: of_task[: data.samples] for task, of_task in samples.items()}
    check_shows_images("--data", [sample for of_task in samples.values() for sample in of_task], data)
    return samples


def check_shows_images(flag: str, samples: list[dict[str, Any]], given: SampleSource) -> None:
    if not any("image" in sample for sample in samples):
        raise MixLoraError(
            f"{flag} {given.data}: none of its samples has an image, so it does not show what LLaVA's layers see in "
            "use; pass data with images"
        )
    if given.image_folder is None:
        raise MixLoraError(f"{flag} {given.data} names images; pass the folder they lie in as --image-folder")
    check_images(samples, given.data, given.image_folder)


def batches(samples: list[dict], loaded: Loaded, given: SampleSource, title: str) -> Iterator[Batch]:
    """The samples as LLaVA's training prepares them, with the image features in the sequence: inputs of the model."""
    dataset, collate = training_data(samples, loaded, given.image_folder, given.version)
    for start in tqdm(range(0, len(samples), given.batch_size), desc=title, unit="batch"):
        batch = collate([dataset[number] for number in range(start, min(start + given.batch_size, len(samples)))])
        yield with_images(loaded[1], batch)


def endless_batches(samples: list[dict], loaded: Loaded, given: SampleSource, seed: int = 0) -> Iterator[Batch]:
    """As [`batches`], the samples in a new random order as often as they are asked for; each batch is full.

    Where there are fewer samples than `given.batch_size`, batches have so many.
    """
    dataset, collate = training_data(samples, loaded, given.image_folder, given.version)
    draw, waiting = random.Random(seed), []
    size = min(given.batch_size, len(samples))
    while True:
        while len(waiting) < size:
            waiting += draw.sample(range(len(samples)), len(samples))
        yield with_images(loaded[1], collate([dataset[number] for number in waiting[:size]]))
        del waiting[:size]


def training_data(
    samples: list[dict], loaded: Loaded, image_folder: str | Path | None, version: str
) -> tuple[Any, Callable[[list[dict[str, Any]]], Batch]]:
    """Upstream's data set of conversations, and its function that makes a batch of some of its items.

    Of a LLaVA that has no training program, data set and function are those of [`TemplateSamples`]. Sets upstream's
    conversation template, which is global there.

    Raises:
        MixLoraError: there is no template `version`.
    """
    conversation = part("llava.conversation")
    if version not in conversation.conv_templates:
        known = ", ".join(conversation.conv_templates)
        raise MixLoraError(f"--version {version}: no such conversation template; expected one of {known}")
    conversation.default_conversation = conversation.conv_templates[version]
    tokenizer, model, image_processor = loaded
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    if used().module(TRAIN) is None:
        dataset = TemplateSamples(samples, loaded, image_folder, version)
        return dataset, dataset.collate
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        with writing(file, "make room there, or name another folder for temporary files in TMPDIR"):
            file.write_text(json.dumps(samples), encoding="utf-8")
        known = part(f"{TRAIN}:DataArguments")
        path = [str(file)] if takes_several_files(known) else str(file)
        arguments = known(data_path=path, image_folder=str(image_folder), is_multimodal=True)
        arguments.image_processor = image_processor
        arguments.image_aspect_ratio = getattr(model.config, "image_aspect_ratio", None) or "square"
        for name in HOW_TO_CUT:
            if getattr(model.config, name, None) is not None:
                setattr(arguments, name, getattr(model.config, name))
        arguments.mm_use_im_start_end = getattr(model.config, "mm_use_im_start_end", False)
        module = part(f"{TRAIN}:make_supervised_data_module")(tokenizer, arguments)
    return module["train_dataset"], module["data_collator"]


def takes_several_files(data_arguments: type) -> bool:
    """Whether a LLaVA's `--data_path` is a list of files, as its class of the flags for data says."""
    kind = get_type_hints(data_arguments)["data_path"]
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


def with_images(model: nn.Module, batch: Batch) -> Batch:
    """LLaVA's batch after it has put the image features into the sequence, which settles mask and labels.

    Args:
        model: a PeftModel around a LLaVA.
        batch: `input_ids`, `attention_mask` and `labels` [B, T], and `images` [B, 3, height, width] or a list of
            images, with what else the collator tells of them.

    Returns:
        `inputs_embeds` [B, S, d], `attention_mask` and `labels` [B, S], and `position_ids` (None), if it takes any.
    """
    llava = model.get_base_model()
    images = batch["images"]  # of several sizes, or in some forks always, a list
    pixels = [each.to(model.device, model.dtype) for each in images]
    told = {**batch, "position_ids": None, "past_key_values": None}
    told |= {"images": pixels if isinstance(images, list) else torch.stack(pixels)}
    told |= {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
    taken = inspect.signature(llava.prepare_inputs_labels_for_multimodal).parameters
    with torch.no_grad():
        prepared = llava.prepare_inputs_labels_for_multimodal(**{name: told[name] for name in taken if name in told})
    *others, mask, _, embeddings, labels = prepared
    # LLaVA of 2023 knows no positions of its own.
    positions = {"position_ids": others[1]} if len(others) > 1 else {}
    return {"inputs_embeds": embeddings, **positions, "attention_mask": mask, "labels": labels}
