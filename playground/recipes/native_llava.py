"""What the recipes share: the embedded default as transformers' own LLaVA, a new adapter for it, and its data."""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from peft import PeftModel, get_peft_model
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.native.export import export_hf
from llava_mixlora.native.processor import TRAINING_TEMPLATE
from playground import PLAYGROUND
from playground.atomic import atomic_directory
from playground.base.tiny_base import VERSION
from playground.data.main_job import TRAIN

CACHE, OUTPUT = PLAYGROUND / "cache", PLAYGROUND / "output"
SETTINGS = {
    "seed": 0,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "train_sampling_strategy": "sequential",  # the data are shuffled already
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def parser(description: str, output: str, steps: int) -> argparse.ArgumentParser:
    """The arguments that all recipes have."""
    made = argparse.ArgumentParser(description=description.partition("\n")[0])
    made.add_argument("--base", type=Path, default=CACHE / "llava-v1-tiny", help="upstream's LLaVA (%(default)s)")
    made.add_argument("--data", type=Path, default=CACHE / "questions" / TRAIN, help="LLaVA's JSON (%(default)s)")
    made.add_argument("--images", type=Path, default=CACHE / "data" / "images", help="folder (%(default)s)")
    made.add_argument("--output", type=Path, default=OUTPUT / output, help="the adapter's folder (%(default)s)")
    made.add_argument("--native", type=Path, default=OUTPUT / "llava-native-base", help="for its base (%(default)s)")
    made.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=16, help="in all (default: %(default)s)")
    made.add_argument("--optim", default="adamw_torch", help="as in TrainingArguments (default: %(default)s)")
    made.add_argument("--learning-rate", type=float, default=2e-3, help="at first (default: %(default)s)")
    return made


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What is the same in all recipes, in the words of `TrainingArguments`."""
    return {"max_steps": given.steps, "optim": given.optim, "learning_rate": given.learning_rate, **SETTINGS}


def check(given: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """End the program in one line where something is missing or a number cannot be."""
    for flag in ("steps", "batch_size"):
        if getattr(given, flag) < 1:
            made.error(f"--{flag.replace('_', '-')}={getattr(given, flag)}: expected at least 1")
    for flag in ("base", "data", "images"):
        if not getattr(given, flag).exists():
            made.error(f"--{flag}={getattr(given, flag)}: not there; bash scripts/finetune_mixlora.sh makes one")


def export(base: Path, native: Path) -> None:
    """Write the base as transformers' LLaVA into `native`, in the place of an earlier one."""
    with atomic_directory(native, "config.json") as folder:
        folder.rmdir()  # export_hf makes it
        export_hf(base, folder, version=VERSION)


def load(native: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor, whose chat template is the one for training: it begins with <s> and marks the answers."""
    processor = AutoProcessor.from_pretrained(native)
    processor.chat_template = (native / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    return LlavaForConditionalGeneration.from_pretrained(native, dtype="float32"), processor


def halve_tower(model: PreTrainedModel) -> None:
    """Run the vision tower in float16, as upstream's train() does unless it is told `--bf16`."""

    def widen(tower: Any, inputs: Any, output: Any) -> Any:
        output["hidden_states"] = tuple(h if h is None else h.float() for h in output["hidden_states"])
        return output

    model.model.vision_tower.half().register_forward_hook(widen)


def adapted(model: PreTrainedModel, **form: Any) -> PeftModel:
    """The model with a new adapter in its decoder; its projector is trained too, as upstream's train() does."""
    config = MixLoraConfig(lora_alpha=32, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM", **form)
    return get_peft_model(model, config)


def samples(data: Path) -> list[dict[str, Any]]:
    """Those of a LLaVA data set.

    Raises:
        MixLoraError: there is none.
    """
    every = json.loads(data.read_text(encoding="utf-8"))
    if not every:
        raise MixLoraError(f"{data}: no samples; expected a list of conversations about images")
    return every


def messages(sample: dict[str, Any]) -> list[dict[str, str]]:
    """A sample's conversation as TRL takes it; the image's mark is written by the chat template."""
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>\n", "")}
        for turn in sample["conversations"]
    ]


def dataset(rows: list[dict[str, Any]], images: Path) -> Dataset:
    """Rows with the name of an `image` in a folder, as a data set with `images`."""
    made = [{**row, "images": [str(images / row["image"])]} for row in rows]
    return Dataset.from_list(made).remove_columns("image").cast_column("images", List(Image(mode="RGB")))


def conversations(every: list[dict[str, Any]], count: int, images: Path) -> Dataset:
    """The first `count` samples, and from the first again where there are fewer: `images` and `messages`."""
    rows = [{"image": sample["image"], "messages": messages(sample)} for sample in islice(cycle(every), count)]
    return dataset(rows, images)
