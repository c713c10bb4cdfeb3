"""MixLoRA in LLaMA-Factory: `python -m llava_mixlora.integrations.llamafactory` in the place of `llamafactory-cli`.

A setting `mixlora:`, fields of `MixLoraConfig`, beside those of `finetuning_type: lora` makes the adapter a MixLoRA.
LLaMA-Factory has no door for further methods, so its adapter module is patched ([`PATCHES`]), in the running process.
"""

# ruff: noqa: E402 -- a missing framework is told of before it is imported

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .framework_settings import NAME, check_continues, make_config, refuse, require

require("llamafactory", "llamafactory", "llamafactory.model.adapter")

from llamafactory.hparams import FinetuningArguments
from peft import PeftConfig, PeftModel

from ..errors import MixLoraError
from ..method.registration import MIXLORA
from ..patches.patch import METHOD, Patch
from ..training.routing_callback import RoutingCallback

OF_LORA_ALONE = (
    *("use_rslora", "use_dora", "pissa_init", "pissa_convert", "loraplus_lr_ratio"),
    *("use_galore", "use_apollo", "use_badam", "use_mca"),
)
OF_LORAS_LOADERS = "use_unsloth", "use_kt"

_arguments: ContextVar[Any] = ContextVar("FinetuningArguments of the adapter that is being made", default=None)
_callbacks: ContextVar[list[Any] | None] = ContextVar("callbacks of the run", default=None)


@dataclass
class MixLoraFinetuningArguments(FinetuningArguments):
    """LLaMA-Factory's arguments, with `mixlora`; `lora_rank` and the like mean what they mean for LoRA.

    Raises:
        MixLoraError: a setting is unknown, is for LoRA alone, cannot be, or has no effect.
    """

    mixlora: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of MixLoraConfig, which make the adapter a MixLoRA; on the command line, JSON."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mixlora, str):
            try:
                self.mixlora = json.loads(self.mixlora)
            except ValueError as error:
                raise MixLoraError(f'{NAME}={self.mixlora!r:.200}: expected JSON, {{"num_factors": 16}}') from error
        if self.mixlora is None:
            return
        if self.finetuning_type != "lora":
            raise MixLoraError(f"{NAME}: has no effect with finetuning_type={self.finetuning_type!r}; set it to lora")
        refuse({name: getattr(self, name, None) for name in OF_LORA_ALONE})
        make_config(self.mixlora, {"r": self.lora_rank, "lora_alpha": self.lora_alpha})


def _with_mixlora(classes: list[type]) -> list[type]:
    if FinetuningArguments not in classes:
        raise MixLoraError(f"LLaMA-Factory's arguments are {classes}; expected FinetuningArguments among them")
    return [MixLoraFinetuningArguments if each is FinetuningArguments else each for each in classes]


def _mixlora_too(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _setup_lora_tuning(
        config: Any,
        model: Any,
        model_args: Any,
        finetuning_args: Any,
        is_trainable: bool,
        cast_trainable_params_to_fp32: bool,
    ) -> Any:
        arguments = config, model, model_args, finetuning_args, is_trainable, cast_trainable_params_to_fp32
        settings, adapters = getattr(finetuning_args, NAME, None), model_args.adapter_name_or_path or []
        place = {
            "subfolder": model_args.adapter_folder,
            "cache_dir": model_args.cache_dir,
            "revision": model_args.model_revision,
            "token": model_args.hf_hub_token,
        }
        of_mixlora = [PeftConfig.from_pretrained(each, **place).peft_type == MIXLORA for each in adapters]
        if settings is None and not any(of_mixlora):
            return original(*arguments)
        refuse({name: getattr(model_args, name, None) for name in OF_LORAS_LOADERS})
        if adapters:
            _check_adapters(adapters, of_mixlora, finetuning_args)
            if not model_args.adapter_folder:
                check_continues(settings, adapters[0])
            if not is_trainable and model_args.export_dir is None:
                # LLaMA-Factory would merge it to be faster, and a merged MixLoRA answers otherwise.
                return PeftModel.from_pretrained(model, adapters[0], **place)
        if (callbacks := _callbacks.get()) is not None and is_trainable:
            callbacks.append(RoutingCallback())
        before = _arguments.set(finetuning_args)
        try:
            return original(*arguments)
        finally:
            _arguments.reset(before)

    return _setup_lora_tuning


def _check_adapters(adapters: list[str], of_mixlora: list[bool], finetuning_args: Any) -> None:
    if not all(of_mixlora):
        raise MixLoraError(
            f"adapter_name_or_path={','.join(adapters)}: {adapters[of_mixlora.index(False)]} is no MIXLORA adapter; "
            f"name one that is, or none, or leave out {NAME}"
        )
    if len(adapters) > 1 or finetuning_args.create_new_adapter:
        raise MixLoraError(
            f"adapter_name_or_path={','.join(adapters)}: LLaMA-Factory merges all but the adapter that it trains, and "
            "a merged MixLoRA answers otherwise; name one adapter, without create_new_adapter"
        )


def _mixlora_config(original: type) -> Callable[..., PeftConfig]:
    @functools.wraps(original, updated=())
    def LoraConfig(**kwargs: Any) -> PeftConfig:
        arguments = _arguments.get()
        if arguments is None:
            return original(**kwargs)
        # MixLoRA's default is what LLaMA-Factory adapts where it is told of nothing else to thaw.
        usual = arguments.lora_target == ["all"] and not arguments.use_llama_pro and not arguments.freeze_language_model
        usual = usual and arguments.freeze_vision_tower and arguments.freeze_multi_modal_projector
        names = "r", "lora_alpha", "lora_dropout", "modules_to_save", "task_type", "inference_mode"
        of_lora = {name: kwargs[name] for name in names}
        return make_config(
            arguments.mixlora, {**of_lora, "target_modules": None if usual else kwargs["target_modules"]}
        )

    return LoraConfig


def _with_callbacks(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _training_function(config: dict[str, Any]) -> None:
        before = _callbacks.set(config["callbacks"])
        try:
            original(config)
        finally:
            _callbacks.reset(before)

    return _training_function


PATCHES = (
    *(
        Patch(
            f"llamafactory.hparams.parser:{name}",
            kind=METHOD,
            why=f"LLaMA-Factory's arguments lack {NAME}",
            replace=_with_mixlora,
        )
        for name in ("_TRAIN_ARGS", "_INFER_ARGS", "_EVAL_ARGS")
    ),
    Patch(
        "llamafactory.model.adapter:_setup_lora_tuning",
        kind=METHOD,
        why="the adapter is a MixLoRA where the arguments, or the adapter to go on from, say so",
        replace=_mixlora_too,
        parameters=(
            "config",
            "model",
            "model_args",
            "finetuning_args",
            "is_trainable",
            "cast_trainable_params_to_fp32",
        ),
    ),
    Patch(
        "llamafactory.model.adapter:LoraConfig",
        kind=METHOD,
        why="a new adapter is made from the MixLoraConfig in the place of LoRA's",
        replace=_mixlora_config,
    ),
    Patch(
        "llamafactory.train.tuner:_training_function",
        kind=METHOD,
        why="a run's callbacks have to sum what the routers' statistics count over the processes",
        replace=_with_callbacks,
        parameters=("config",),
    ),
    Patch(
        "llamafactory.launcher:__file__",
        kind=METHOD,
        why="the processes that LLaMA-Factory starts for several GPUs need the patches too",
        replace=lambda _: f"-m {__name__} train",  # what it puts behind torchrun's options, and splits at spaces
    ),
)


def apply() -> None:
    """Apply [`PATCHES`]; does nothing the second time.

    Raises:
        PatchError: LLaMA-Factory lacks what one replaces. Nothing stays half patched.
    """
    try:
        for patch in PATCHES:
            patch.apply()
    except Exception:
        undo()
        raise


def undo() -> None:
    """Take every patch back, last one first."""
    for patch in reversed(PATCHES):
        patch.undo()


def main() -> None:
    """`llamafactory-cli` with MixLoRA in it: the same commands and arguments.

    Raises:
        SystemExit: with the line of a MixLoraError.
    """
    try:
        if os.environ.get("USE_V1", "0").lower() in ("1", "true", "y"):
            raise MixLoraError("USE_V1: MixLoRA is in no part of LLaMA-Factory's v1; unset it")
        apply()
        if "LOCAL_RANK" in os.environ and sys.argv[1:2] == ["train"]:  # one of torchrun's processes
            from llamafactory.train.tuner import run_exp

            del sys.argv[1]
            run_exp()
        else:
            from llamafactory.cli import main as command_line

            command_line()
    except MixLoraError as error:
        sys.exit(f"{NAME}: error: {error}")


if __name__ == "__main__":
    from llava_mixlora.integrations import llamafactory as module  # patched once, under one name

    module.main()
