"""The data of a run of `llava.train.train`: read and checked before the model is loaded, alike in every process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import AutoTokenizer

from ..adapters.tower_config import tower_config
from ..data.check import MAX_LOST_SHARE, DataCheck, check_data
from ..data.images import CHECKS, HEADERS, NONE
from ..data.token_counts import WITHOUT_TEMPLATE, TokenCounter
from ..errors import MixLoraError
from ..llava_package import TRAIN, file_of, part, used
from .given_flags import is_true

UPSTREAM_DEFAULTS = {"version": "v0", "model_max_length": "512", "mm_vision_select_feature": "patch"}


@dataclass(frozen=True)
class RunData:
    """What was found in `--data_path`, and in `--eval_data_path` where there is one."""

    training: DataCheck
    held_out: DataCheck | None = None

    def of(self, path: str) -> DataCheck | None:
        """That of a file of the run; None of another."""
        return next((found for found in (self.training, self.held_out) if found and found.path == path), None)


def check_run_data(flags: Mapping[str, str]) -> RunData:
    """Read the data of a run and check it; the first process of each machine looks at images and tokens too.

    Args:
        flags: as given to `llava.train.train`.

    Raises:
        MixLoraError: data cannot be read, too much of it teaches nothing, or a flag of the check is wrong.
    """
    counter = token_counter(flags) if _looks() else None
    training = _checked(flags, flags["data_path"], flags.get("image_folder"), counter)
    check_processes(training.usable, training.path)
    held_out = None
    if path := flags.get("eval_data_path"):
        held_out = _checked(flags, path, flags.get("eval_image_folder") or flags.get("image_folder"), counter)
    return RunData(training, held_out)


def _checked(flags: Mapping[str, str], path: str, image_folder: str | None, counter: TokenCounter | None) -> DataCheck:
    images, share = flags.get("check_images", HEADERS), max_lost_share(flags)
    if images not in CHECKS:
        raise MixLoraError(f"--check_images {images}: expected one of {', '.join(CHECKS)}")
    found = check_data(
        path,
        image_folder,
        images=images if _looks() else NONE,
        padded=flags.get("image_aspect_ratio") == "pad",
        counter=counter,
        keep=True,
    )
    if os.environ.get("RANK", "0") == "0":
        print(found.table(), flush=True)
    found.refuse_losses(share if _looks() else 1.0)
    return found


def _looks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def max_lost_share(flags: Mapping[str, str]) -> float:
    """The value of `--max_lost_share`.

    Raises:
        MixLoraError: it is not a number from 0 to 1.
    """
    word = flags.get("max_lost_share", str(MAX_LOST_SHARE))
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise MixLoraError(f"--max_lost_share {word}: expected a number from 0 (refuse any loss) to 1")
    return share


def agree(found: DataCheck) -> None:
    """Leave out in every process what the check of one of them has found to be lost (collective)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    lost = sorted(set(range(found.entries)) - set(found.numbers))
    of_all: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, lost)
    found.leave_out(set().union(*of_all))


def check_processes(samples: int, data_path: str | Path) -> None:
    """Refuse fewer samples than processes, of which a launcher tells the number in `WORLD_SIZE`.

    Raises:
        MixLoraError: with both numbers.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if samples < processes:
        raise MixLoraError(
            f"{data_path}: expected at least one conversation for each of {processes} processes, got {samples}; "
            "add data, or start fewer (GPUS=1, deepspeed --num_gpus 1, torchrun --nproc_per_node 1)"
        )


def token_counter(flags: Mapping[str, str]) -> TokenCounter | None:
    """Counts tokens as the run will make them; None where the tokenizer or the tower is not known before the run.

    LLaVA has to be importable.
    """
    model, tower = flags.get("model_name_or_path"), flags.get("vision_tower")
    known = {**UPSTREAM_DEFAULTS, **flags}
    tokenizer = _tokenizer(model, flags.get("cache_dir"), known["model_max_length"])
    if tokenizer is None:
        return None
    config = tower_config(tower, flags.get("cache_dir"))
    if tower and config is None:
        return None
    # What is longer than the limit is told in the table; transformers would warn of errors that it cannot cause.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    version, marks_ends = known["version"], is_true(flags, "mm_use_im_start_end")
    if version not in WITHOUT_TEMPLATE or version == "v0.5":
        tokenizer.pad_token = tokenizer.unk_token or (tokenizer.pad_token if _keeps_padding() else None)
    elif tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if marks_ends:
        constants = part("llava.constants")
        marks = [constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN]
        tokenizer.add_tokens(marks, special_tokens=True)
    image_tokens = config.image_tokens(known["mm_vision_select_feature"]) if config else 1
    return TokenCounter(tokenizer, version, image_tokens, marks_ends)


def _keeps_padding() -> bool:
    """Whether the LLaVA that is used leaves a tokenizer without an unknown token the padding that it has.

    LLaVA itself takes it away, and its training ends there.
    """
    module = used().module(TRAIN)
    file = None if module is None else file_of(module)
    return file is not None and "unk_token is not None" in file.read_text(encoding="utf-8")


def _tokenizer(model: str | None, cache_dir: str | None, limit: str) -> Any:
    """As upstream loads it; the fast one where that alone is there, as for many a Qwen2; None where none can be had."""
    for options in ({"use_fast": False}, {}):
        try:
            return AutoTokenizer.from_pretrained(
                model, cache_dir=cache_dir, model_max_length=int(limit), padding_side="right", **options
            )
        except Exception:  # a model of the hub that cannot be had: the run itself says why
            continue
    return None
