"""`llava.train.train`: the MixLoRA flags, the adapter that they describe, and checks before the model is loaded."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from transformers import HfArgumentParser, LlamaForCausalLM, PretrainedConfig, set_seed

from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL, is_mixlora_adapter
from llava_mixlora.adapters.adapter_record import AdapterRecord
from llava_mixlora.adapters.config_file import absolute, config_of
from llava_mixlora.attention import available_attention
from llava_mixlora.data.kept_calibration import SAMPLES, check_count
from llava_mixlora.errors import MixLoraError
from llava_mixlora.folder_lock import locked
from llava_mixlora.llava_package import TRAIN, part, used
from llava_mixlora.method.config import MixLoraConfig
from llava_mixlora.method.model import MixLoraModel
from llava_mixlora.training.base_flags import flags_of_the_base
from llava_mixlora.training.continuing import continued_config, continued_tasks, words_of_adapter
from llava_mixlora.training.first_process import decided_by_first
from llava_mixlora.training.given_flags import given_flags, trains_adapter
from llava_mixlora.training.known_flags import read_flags
from llava_mixlora.training.preflight import check_training_inputs
from llava_mixlora.training.record import training_record
from llava_mixlora.training.resuming import Run, check_resuming, describe_run, finished, is_written
from llava_mixlora.training.run_data import RunData
from llava_mixlora.training.task_labels import task_names
from llava_mixlora.training.termination import interruptible
from llava_mixlora.training.unusable_flags import check_usable
from llava_mixlora.writing import is_failed_write, reason_of

from .patch import COMPATIBILITY, FAULT, METHOD, Patch, PatchError

OF_LORA = ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "bits")
"""The flags of LLaVA's own that those of MixLoRA are built on."""
PRESETS = {None: MixLoraConfig, "paper": MixLoraConfig.paper, "paper_formulas": MixLoraConfig.paper_formulas}


@dataclass
class MixLoraArguments:
    """Flags next to LLaVA's own `--lora_r --lora_alpha --lora_dropout --lora_bias --bits`, which keep their meaning."""

    mixlora_enable: bool = field(default=False, metadata={"help": "Train a MixLoRA adapter (implies --lora_enable)."})
    mixlora_num_factors: Optional[int] = field(
        default=None, metadata={"help": "Factors in each pool (E). Default: 16, or --lora_r where that is larger."}
    )
    mixlora_pairing: Optional[str] = field(
        default=None,
        metadata={"help": "same (default; rank with ifs_cfs): one router for both pools; rank: two routers."},
    )
    mixlora_routing: Optional[str] = field(
        default=None, metadata={"help": "ifs (default; ifs_cfs with --mixlora_pairing rank), ifs_cfs or random."}
    )
    mixlora_router_gradient: Optional[str] = field(
        default=None, metadata={"help": "straight_through (default) trains the routers, none leaves them random."}
    )
    mixlora_router_init: Optional[str] = field(
        default=None, metadata={"help": "How routers start: uniform (default), or zero, all inputs on one route."}
    )
    mixlora_router_scope: Optional[str] = field(
        default=None,
        metadata={
            "help": "Positions that routers average: instruction (default), the text of the question alone, prompt or "
            "sequence."
        },
    )
    mixlora_router_input: Optional[str] = field(
        default=None,
        metadata={
            "help": "What routers average: words (default), the text's embeddings, or hidden, each layer's input."
        },
    )
    mixlora_decode_routing: Optional[str] = field(
        default=None, metadata={"help": "prefill (default) keeps the prompt's routes while generating, or step."}
    )
    mixlora_cfs: Optional[str] = field(
        default=None, metadata={"help": "What CFS trains: weights (default), or table, the scores that they come to."}
    )
    mixlora_cfs_temperature: Optional[float] = field(
        default=None, metadata={"help": "CFS's scores are divided by it; below 1 they decide more. Default: 1."}
    )
    mixlora_unknown_prompt: Optional[str] = field(
        default=None, metadata={"help": "What a step does whose labels show no prompt: warn (default) or error."}
    )
    mixlora_balance_loss_weight: Optional[float] = field(
        default=None, metadata={"help": "Weight of a loss term that favours using all factors alike. Default: 0."}
    )
    mixlora_task_loss_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "Weight of a loss term that asks routers for the factors of each sample's task, by its field "
            "'task' in --data_path. Default: 0."
        },
    )
    mixlora_router_lr: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the routers. Default: --learning_rate."}
    )
    check_images: str = field(
        default="headers",
        metadata={
            "help": "How far images are checked before the run: headers (and the ends of files), full (every pixel) or "
            "none."
        },
    )
    max_lost_share: float = field(
        default=0.01,
        metadata={
            "help": "Largest share of entries of --data_path that may teach nothing (unusable, or cut off before the "
            "answer); they are left out. 0 refuses any."
        },
    )
    mixlora_init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "Start from this trained MixLoRA adapter, on other data: its factors, routers, statistics and "
            "projector go on; of a plain LoRA, its projector. What no flag says is as in the adapter, its base too."
        },
    )
    mixlora_calibration_samples: int = field(
        default=SAMPLES,
        metadata={
            "help": "How many samples of --data_path are kept beside the adapter (texts and names of images), for "
            f"merging. Default: {SAMPLES}; 0 keeps none."
        },
    )
    mixlora_preset: Optional[str] = field(
        default=None,
        metadata={
            "help": "paper: the behaviour of the authors' released code; paper_formulas: what the paper writes. Other "
            "flags still count."
        },
    )

    def __post_init__(self) -> None:
        if self.mixlora_enable:
            self.lora_enable = True
            if self.mixlora_task_loss_weight:
                self._find_tasks()
            self.mixlora_config()  # names a bad value now, not after the model is loaded
            check_count(self.mixlora_calibration_samples)
        super().__post_init__()
        if (running := _running_train.get()) is not None:
            running.arguments = self
            is_first = self.process_index == 0
            if self.lora_enable and decided_by_first(is_first, lambda: self._has_its_result(running)):
                raise NothingToTrain
            # Trainer seeds too, but after train() has drawn the adapter and the projector: too late to repeat a run.
            set_seed(self.seed)

    def mixlora_config(self, target_modules: list[str] | None = None) -> MixLoraConfig:
        """The configuration that the flags describe.

        Raises:
            MixLoraError: a flag holds a value outside its documented set.
        """
        if self.mixlora_preset not in PRESETS:
            raise MixLoraError(
                f"mixlora_preset={self.mixlora_preset!r}: expected 'paper' or 'paper_formulas', or no --mixlora_preset"
            )
        given = {
            "pairing": self.mixlora_pairing,
            "routing": self.mixlora_routing,
            "router_gradient": self.mixlora_router_gradient,
            "router_init": self.mixlora_router_init,
            "router_scope": self.mixlora_router_scope,
            "router_input": self.mixlora_router_input,
            "decode_routing": self.mixlora_decode_routing,
            "cfs": self.mixlora_cfs,
            "cfs_temperature": self.mixlora_cfs_temperature,
            "unknown_prompt": self.mixlora_unknown_prompt,
            "balance_loss_weight": self.mixlora_balance_loss_weight,
            "task_loss_weight": self.mixlora_task_loss_weight,
            "tasks": running_tasks(),
        }
        of_upstream = {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "bias": {"lora_only": "mixlora_only"}.get(self.lora_bias, self.lora_bias),
        }
        factors = self.mixlora_num_factors
        if self.mixlora_init_from is not None:
            continued = continued_config(self.mixlora_init_from, {**of_upstream, "num_factors": factors, **given})
            if continued is not None:
                return continued
        return PRESETS[self.mixlora_preset](
            num_factors=max(MixLoraConfig.num_factors, self.lora_r) if factors is None else factors,
            **of_upstream,
            target_modules=target_modules,
            exclude_modules=NOT_THE_LANGUAGE_MODEL,
            task_type="CAUSAL_LM",
            **{name: value for name, value in given.items() if value is not None},
        )

    def _has_its_result(self, running: RunningTrain) -> bool:
        """Describe the run, compare it with the one that wrote its checkpoints; whether its result is there already."""
        if running.data is None:
            return False
        running.run = describe_run(_all_flags(), running.data.training.samples, self.world_size * max(1, self.n_gpu))
        adapter = self.mixlora_config() if self.mixlora_enable else None
        for note in check_resuming(self.output_dir, running.run, adapter):
            print(note, flush=True)
        last = finished(self.output_dir, running.run)
        if last is None:
            return False
        written = is_written(self.output_dir, last)
        print(
            f"already finished, nothing to train: {last} is of the last step; {self.output_dir} "
            f"{'holds' if written else 'gets'} its result",
            flush=True,
        )
        return written

    def _find_tasks(self) -> None:
        """Read the names of the tasks from the data, which are other flags' matter, if a train() is running."""
        if self.remove_unused_columns:
            raise MixLoraError(
                "--remove_unused_columns True removes each sample's task, and its image, before the batch is made; "
                "leave it out, or --mixlora_task_loss_weight"
            )
        running = _running_train.get()
        if running is not None and running.data is not None:
            running.tasks = task_names(running.data.training.samples, running.data.training.path)
            if self.mixlora_init_from is not None and is_mixlora_adapter(self.mixlora_init_from):
                running.tasks = continued_tasks(self.mixlora_init_from, running.tasks)


class NothingToTrain(Exception):
    """Ends a train() whose result is there already, before the model is loaded."""


@dataclass
class RunningTrain:
    """One call of train(): what is known of it so far.

    Args:
        data: its data, once read and checked.
        arguments: its flags, once they are parsed.
        tasks: those of its data, where they count.
        run: what its checkpoints tell of it, in the first process of a run that trains an adapter.
        vision_tower: the tower that it trains with, by whatever name the base has for it.
        grown_tokenizer: its tokenizer, once it has tokens that the base's has not.
        record: what it trains with, once that was asked for.
        beside: what was trained beside the adapter, between being gathered and being saved with it.
    """

    data: RunData | None = None
    arguments: MixLoraArguments | None = None
    tasks: list[str] | None = None
    run: Run | None = None
    vision_tower: str | None = None
    grown_tokenizer: Any = None
    record: AdapterRecord | None = None
    beside: dict[str, Any] | None = None


_running_train: ContextVar[RunningTrain | None] = ContextVar("the train() that is running", default=None)


def running_train() -> RunningTrain | None:
    """The train() that is running; None outside of one."""
    return _running_train.get()


def running_arguments() -> MixLoraArguments | None:
    """The flags of the train() that is running; None outside of one, and before it has parsed them."""
    running = _running_train.get()
    return None if running is None else running.arguments


def running_tasks() -> list[str] | None:
    """The tasks of the data of the train() that is running; None outside of one, and without a task loss."""
    running = _running_train.get()
    return None if running is None else running.tasks


def running_run() -> Run | None:
    """What the checkpoints of the train() that is running tell of it, in its first process."""
    running = _running_train.get()
    return None if running is None else running.run


def _all_flags() -> dict[str, Any]:
    """Every flag of train() with its value, as the command line gives it; defaults too."""
    upstream = part(TRAIN)
    parser = HfArgumentParser((upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments))
    return vars(parser.parse_args(sys.argv[1:]))


@dataclass
class EvaluationStrategy:
    """The flag that upstream's scripts pass for what is `--eval_strategy` now."""

    evaluation_strategy: Optional[str] = field(default=None, metadata={"help": "Old name of --eval_strategy."})

    def __post_init__(self) -> None:
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        super().__post_init__()


@dataclass
class RenamedArguments:
    """Flags that upstream's scripts pass or read, and that transformers 5 has renamed, dropped or left alone."""

    warmup_ratio: Optional[float] = field(
        default=None, metadata={"help": "Warmup as a share of all steps; now a --warmup_steps below 1."}
    )
    save_safetensors: bool = field(default=True, metadata={"help": "No longer a choice: always safetensors."})

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.local_rank == -1:
            # transformers no longer asks the launcher, and train() saves in each process whose rank is 0 or -1.
            self.local_rank = int(os.environ.get("LOCAL_RANK", -1))
        super().__post_init__()


def with_flags(flags: type) -> Callable[[type], type]:
    """What makes a class of training arguments one that has the fields of `flags` too."""

    def extend(original: type) -> type:
        # The class keeps its name and module, by which Trainer pickles it into training_args.bin.
        identity = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        return dataclass(type(original.__name__, (flags, original), identity))

    return extend


def _with_mixlora_flags(original: type) -> type:
    missing = [name for name in OF_LORA if name not in inspect.signature(original).parameters]
    if missing:
        raise PatchError(
            f"{used().name}, in {used().folder}, trains without LoRA: its {original.__name__} has no "
            f"{', '.join(missing)}, which --mixlora_enable needs; take a LLaVA that has these flags"
        )
    return with_flags(MixLoraArguments)(original)


def _train_checked(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> None:
        running, call = RunningTrain(), inspect.signature(original).bind(*args, **kwargs)
        argv, token = sys.argv, _running_train.set(running)
        try:
            # All that reads flags, here and upstream, reads them there.
            sys.argv = [*argv, *words_of_adapter(argv[1:])]
            sys.argv = [*sys.argv, *_words_of_the_base(sys.argv[1:])]
            running.data = check_training_inputs(sys.argv[1:])
            flags = given_flags(sys.argv[1:])
            running.vision_tower, output_dir = flags.get("vision_tower"), flags.get("output_dir")
            lock = nullcontext() if output_dir is None else locked(output_dir, "--output_dir")
            with lock, interruptible(output_dir):
                if ATTENTION in call.signature.parameters:  # older ones replace Llama's own attention by flash-attn's
                    call.arguments[ATTENTION] = available_attention(call.arguments.get(ATTENTION))
                original(*call.args, **call.kwargs)
        except NothingToTrain:
            return
        except MixLoraError as error:
            # What a worker of a DataLoader raises comes with its traceback in the message; ours are the last line.
            raise MixLoraError(str(error).strip().splitlines()[-1].removeprefix(_ERROR_OF_A_WORKER)) from error
        except (RuntimeError, SafetensorError) as error:
            if not is_failed_write(error):
                raise
            raise MixLoraError(
                f"--output_dir {output_dir} could not be written ({reason_of(error)}); its checkpoints are as they "
                "were: make room, then the same command goes on"
            ) from error
        finally:
            sys.argv = argv
            _running_train.reset(token)

    return train


ATTENTION = "attn_implementation"
_ERROR_OF_A_WORKER = f"{MixLoraError.__module__}.{MixLoraError.__qualname__}: "


def _words_of_the_base(words: list[str]) -> list[str]:
    """The flags, with their values, that the base decides and the user left out, of a run that trains an adapter.

    Raises:
        MixLoraError: there is no such flag, or it contradicts the base or makes no usable result.
    """
    upstream, templates = part(TRAIN), part("llava.conversation:conv_templates")
    given, defaults = read_flags((upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments), words)
    if not trains_adapter(given_flags(words)):
        return []
    check_usable(given, defaults, templates)
    added = flags_of_the_base(given, defaults)
    return [word for flag, value in added.items() for word in (f"--{flag}", str(value))]


def _class_of_the_model(original: type) -> type:
    class LlavaLlamaForCausalLM(original):
        @classmethod
        def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> Any:
            flags = running_arguments()
            wants_mistral = flags is not None and flags.mixlora_enable and _is_mistral(path, kwargs.get("cache_dir"))
            of_mistral = _on("MistralForCausalLM") if wants_mistral and issubclass(original, LlamaForCausalLM) else None
            kwargs |= _tower_of_the_run(path, kwargs.get("cache_dir"))
            return (of_mistral or original).from_pretrained(path, *args, **kwargs)

    return LlavaLlamaForCausalLM


def _on(language_model: str) -> type | None:
    """The LLaVA on a language model of transformers."""
    found = [one for one in used().language_models if language_model in one.bases]
    return getattr(importlib.import_module(found[0].module), found[0].name) if found else None


def _tower_of_the_run(path: str, cache_dir: str | None) -> dict[str, str]:
    # As it is, a LLaVA trains with the tower that its own config.json names, and the flag's is loaded afterwards.
    running = running_train()
    tower = running.vision_tower if running is not None and trains_adapter(given_flags(sys.argv[1:])) else None
    named = (config_of(path, cache_dir) or {}).get("mm_vision_tower") if tower else None
    return {"mm_vision_tower": tower} if named is not None else {}


def _is_mistral(path: str, cache_dir: str | None) -> bool:
    kind = PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)[0].get("model_type")
    return kind in ("mistral", "llava_mistral")


def _adapter_by_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        flags = running_arguments()
        if flags is None:
            return original(model, peft_config, *args, **kwargs)
        if flags.mixlora_enable:
            peft_config = flags.mixlora_config(sorted(peft_config.target_modules))
            peft_config.training_record = training_record(_running_train.get().data.training, flags)
        adapted = original(model, peft_config, *args, **kwargs)
        # The adapter names its base, and is loaded in other working directories.
        if base := peft_config.base_model_name_or_path:
            peft_config.base_model_name_or_path = absolute(base)
        if flags.mixlora_enable and flags.bits in (4, 8) and flags.bf16:
            _store_adapter_in_bfloat16(adapted)
        return adapted

    return get_peft_model


def _store_adapter_in_bfloat16(model: Any) -> None:
    # As train() does, by PEFT's LoraLayer, for LoRA adapters on quantized weights. With --fp16 they stay float32 there
    # too: a gradient scaler cannot unscale float16 gradients.
    for name, parameter in model.named_parameters():
        if MixLoraModel.prefix in name:
            parameter.data = parameter.data.to(torch.bfloat16)


PATCHES = (
    Patch(
        "llava.train.train:TrainingArguments",
        kind=METHOD,
        why="train() parses its flags into this class, and MixLoRA has flags of its own",
        replace=_with_mixlora_flags,
    ),
    Patch(
        "llava.train.train:TrainingArguments",
        kind=COMPATIBILITY,
        why="upstream's scripts pass --evaluation_strategy, which transformers has renamed",
        replace=with_flags(EvaluationStrategy),
        requires={"transformers": ">=4.51"},
    ),
    Patch(
        "llava.train.train:TrainingArguments",
        kind=COMPATIBILITY,
        why="upstream's scripts pass flags that transformers 5 has renamed",
        replace=with_flags(RenamedArguments),
        requires={"transformers": ">=5"},
    ),
    Patch(
        "llava.train.train:train",
        kind=METHOD,
        why="bad input should be named before the model is loaded, two runs in one output folder undo each other, and "
        "flash attention may not be installed",
        replace=_train_checked,
    ),
    Patch(
        "llava.train.train:LlavaLlamaForCausalLM",
        kind=FAULT,
        why="train() takes every model for a Llama, after which a Mistral loses its attention window and its name",
        replace=_class_of_the_model,
    ),
    Patch(
        "peft:get_peft_model",
        kind=METHOD,
        why="train() asks it for a LoRA adapter, from LoRA's flags; with --mixlora_enable it makes a MixLoRA adapter",
        replace=_adapter_by_flags,
        parameters=("model", "peft_config"),
    ),
)
