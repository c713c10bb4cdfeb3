"""`llava.train.train`: an adapter's folder that holds all that loading it takes, for plain LoRA as for MixLoRA.

Its final output and its checkpoints are written through these functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from llava_mixlora.adapters.adapter_folder import SAFE_NON_LORA_TRAINABLES
from llava_mixlora.data.kept_calibration import KEPT, keep_calibration
from llava_mixlora.training.given_flags import given_flags
from llava_mixlora.training.run_data import UPSTREAM_DEFAULTS
from llava_mixlora.training.run_record import run_record
from llava_mixlora.training.saved_tensors import beside_the_adapter, with_the_adapter
from llava_mixlora.writing import follow_umask, save_tensors

from .llava_train import RunningTrain, running_train
from .patch import FAULT, METHOD, Patch

State = dict[str, Any]


def _save_biases(original: Callable[..., State]) -> Callable[..., State]:
    @functools.wraps(original)
    def get_peft_state_maybe_zero_3(named_params: Any, bias: str) -> State:
        # Of these upstream takes all.
        return original(with_the_adapter(named_params, bias), "all")

    return get_peft_state_maybe_zero_3


def _save_what_the_base_lacks(original: Callable[..., State]) -> Callable[..., State]:
    @functools.wraps(original)
    def get_peft_state_non_lora_maybe_zero_3(named_params: Any, require_grad_only: bool = True) -> State:
        running = running_train()
        if not require_grad_only or running is None:
            return original(named_params, require_grad_only)
        running.beside = original(beside_the_adapter(named_params, running.grown_tokenizer is not None), False)
        return running.beside

    return get_peft_state_non_lora_maybe_zero_3


def _notice_new_tokens(place: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a function whose argument `tokenizer` is its `place`-th, if not given by name."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def add_tokens(*args: Any, **kwargs: Any) -> None:
            tokenizer = kwargs["tokenizer"] if "tokenizer" in kwargs else args[place]
            before = len(tokenizer)
            original(*args, **kwargs)
            running = running_train()
            if running is not None and len(tokenizer) > before:
                running.grown_tokenizer = tokenizer

        return add_tokens

    return replace


def _save_what_loading_takes(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        original(self, save_directory, *args, **kwargs)
        running = running_train()
        if running is None:
            return
        weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            follow_umask(weights)
        if running.beside is not None:  # upstream saves them itself as well, in a file that could hold code
            save_tensors(running.beside, Path(save_directory) / SAFE_NON_LORA_TRAINABLES)
            running.beside = None
        base, flags = self.active_peft_config.base_model_name_or_path, running.arguments
        if base and running.record is None:
            running.record = run_record(base, self.get_base_model().config, running.run, flags and flags.cache_dir)
        if running.record is not None:
            running.record.save(save_directory)
        if running.grown_tokenizer is not None:
            running.grown_tokenizer.save_pretrained(Path(save_directory))

    return save_pretrained


def _keep_samples(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        original(self, save_directory, *args, **kwargs)
        running = running_train()
        if running is not None and running.data is not None and running.arguments.mixlora_enable:
            _keep(Path(save_directory), running)

    return save_pretrained


def _keep(folder: Path, running: RunningTrain) -> None:
    given, data = {**UPSTREAM_DEFAULTS, **given_flags(sys.argv[1:])}, running.data.training
    count, seed = running.arguments.mixlora_calibration_samples, running.arguments.seed
    # --version v0 leaves LLaVA with the template of v1, which the record tells.
    template = (running.record and running.record.conversation) or given["version"]
    keep_calibration(folder, data.samples, count, data.path, given.get("image_folder"), template, seed)
    if count and folder.absolute() == Path(running.arguments.output_dir).absolute():
        print(
            f"{KEPT}: {min(count, data.usable)} samples of {data.path} are kept beside the adapter for merging (texts "
            "and names of images); --mixlora_calibration_samples 0 keeps none",
            flush=True,
        )


PATCHES = (
    Patch(
        "llava.train.train:get_peft_state_maybe_zero_3",
        kind=FAULT,
        why="--lora_bias lora_only ends in a traceback when it saves, and all saves biases of the tower too (#1498)",
        replace=_save_biases,
        parameters=("named_params", "bias"),
    ),
    Patch(
        "llava.train.train:get_peft_state_non_lora_maybe_zero_3",
        kind=FAULT,
        why="it leaves out what was not trained and is not in the base: rows for new tokens (#470), a frozen projector",
        replace=_save_what_the_base_lacks,
        parameters=("named_params", "require_grad_only"),
    ),
    Patch(
        "llava.train.train:smart_tokenizer_and_embedding_resize",
        kind=FAULT,
        why="--version v0 gives the vocabulary a token, whose row has to be saved",
        replace=_notice_new_tokens(1),
        parameters=("tokenizer",),
    ),
    Patch(
        "llava.model.llava_arch:LlavaMetaForCausalLM.initialize_vision_tokenizer",
        kind=FAULT,
        why="--mm_use_im_start_end and --mm_use_im_patch_token give the vocabulary tokens, whose rows have to be saved",
        replace=_notice_new_tokens(2),
        parameters=("tokenizer",),
    ),
    Patch(
        "peft:PeftModel.save_pretrained",
        kind=FAULT,
        why="an adapter names its base by a name alone, under which another model may lie, does not tell its template, "
        "and lacks new tokens; what was trained beside it lies in a pickle alone",
        replace=_save_what_loading_takes,
        parameters=("save_directory",),
    ),
    Patch(
        "peft:PeftModel.save_pretrained",
        kind=METHOD,
        why="merging makes a static stand-in for a MixLoRA adapter from data, and judges it by them",
        replace=_keep_samples,
        parameters=("save_directory",),
    ),
)
