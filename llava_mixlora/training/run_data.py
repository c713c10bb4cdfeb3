"""The data of a run of `llava.train.train`: read and checked before the model is loaded, alike in every process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import AutoTokenizer, PretrainedConfig

from ..data.check import MAX_LOST_SHARE, DataCheck, check_data
from ..data.images import CHECKS, HEADERS, NONE
from ..data.token_counts import WITHOUT_TEMPLATE, TokenCounter
from ..errors import MixLoraError
from .given_flags import is_true

UPSTREAM_DEFAULTS = {"version": "v0", "model_max_length": "512", "mm_vision_select_feature": "patch"}


def check_run_data(flags: Mapping[str, str]) -> DataCheck:
    """Read `--data_path` and check it; the first process of each machine looks at images and tokens too.

    Args:
        flags: as given to `llava.train.train`.

    Raises:
        MixLoraError: the data cannot be read, too much of it teaches nothing, or a flag of the check is wrong.
    """
    images, share = flags.get("check_images", HEADERS), max_lost_share(flags)
    if images not in CHECKS:
        raise MixLoraError(f"--check_images {images}: expected one of {', '.join(CHECKS)}")
    looks = os.environ.get("LOCAL_RANK", "0") == "0"
    found = check_data(
        flags["data_path"],
        flags.get("image_folder"),
        images=images if looks else NONE,
        padded=flags.get("image_aspect_ratio") == "pad",
        counter=token_counter(flags) if looks else None,
        keep=True,
    )
    if os.environ.get("RANK", "0") == "0":
        print(found.table(), flush=True)
    found.refuse_losses(share if looks else 1.0)
    check_processes(found.usable, found.path)
    return found


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, model_max_length=int(known["model_max_length"]), padding_side="right", use_fast=False
        )
        image_tokens = tower_tokens(tower, known["mm_vision_select_feature"]) if tower else 1
    except Exception:  # a model of the hub that is not here yet: the run itself fetches it, or says why it cannot
        return None
    # What is longer than the limit is told in the table; transformers would warn of errors that it cannot cause.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    version, marks_ends = known["version"], is_true(flags, "mm_use_im_start_end")
    if version not in WITHOUT_TEMPLATE or version == "v0.5":
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if marks_ends:
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN

        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return TokenCounter(tokenizer, version, image_tokens, marks_ends)


def tower_tokens(vision_tower: str, select_feature: str = "patch") -> int:
    """Features of one image that a CLIP tower puts into the sequence: its patches, and its class with `cls_patch`."""
    config = PretrainedConfig.get_config_dict(vision_tower)[0]
    config = config.get("vision_config") or config
    side = config.get("image_size", 224) // config.get("patch_size", 32)
    return side * side + (select_feature == "cls_patch")
