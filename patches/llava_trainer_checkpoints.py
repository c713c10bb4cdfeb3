"""`llava.train.llava_trainer`: checkpoints of adapter runs that are whole, and going on from them exactly.

They hold for upstream's plain LoRA as for MixLoRA; runs without an adapter keep upstream's ways.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES, read_non_lora_trainables
from llava_mixlora.errors import MixLoraError
from llava_mixlora.llava_package import TRAIN, part
from llava_mixlora.training import checkpoint
from llava_mixlora.training.best_checkpoint import EarlyStopping
from llava_mixlora.training.first_process import decided_by_first
from llava_mixlora.training.resuming import check_usable, write_run
from llava_mixlora.training.termination import SaveOnTermination

from .llava_train import running_run
from .patch import FAULT, Patch


class RepeatableOrder(Sampler):
    """Another sampler's order, drawn anew in each epoch from `seed` and the epoch's number alone.

    Left to itself, LLaVA's `LengthGroupedSampler` draws from the global generator, which a run that goes on from a
    checkpoint finds in another state than the run that wrote it.

    Args:
        sampler: draws its order from the CPU's global generator.
        seed: the run's.
        epoch: tells the number of the epoch that is about to begin.
    """

    def __init__(self, sampler: Sampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + self.epoch())
            order = list(self.sampler)
        return iter(order)


def _repeat_order(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_train_sampler(self: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = original(self, *args, **kwargs)
        if sampler is None or not isinstance(self.model, PeftModel):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatableOrder(sampler, seed, lambda: int(self.state.epoch or 0))

    return _get_train_sampler


def _save_on_termination(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.model, PeftModel):
            self.add_callback(SaveOnTermination)

    return __init__


def _save_what_train_saves(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not isinstance(self.model, PeftModel) or getattr(self.args, "tune_mm_mlp_adapter", False):
            return original(self, output_dir, _internal_call)
        upstream = part(TRAIN)
        folder = Path(output_dir or self.args.output_dir)
        # Every process takes part: under ZeRO-3 the parameters are gathered.
        adapter = upstream.get_peft_state_maybe_zero_3(self.model.named_parameters(), self.args.lora_bias)
        beside = upstream.get_peft_state_non_lora_maybe_zero_3(self.model.named_parameters())
        if self.args.should_save:
            self._save(str(folder), state_dict=adapter)
            config = copy.deepcopy(self.model.config)
            config.use_cache = True  # turned off for training alone
            config.save_pretrained(folder)
            torch.save(beside, folder / NON_LORA_TRAINABLES)

    return save_model


def _save_aside_then_rename(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _save_checkpoint(self: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.model, PeftModel) or getattr(self.args, "tune_mm_mlp_adapter", False):
            return original(self, model, trial, *args, **kwargs)
        output_dir = self._get_output_dir(trial=trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint.saving(Path(output_dir) / name):
            with _output_dir(self, checkpoint.unfinished(output_dir)):
                original(self, model, trial, *args, **kwargs)
            _name_best_by_its_place(self, output_dir, name)
            # The first of all, then those of other machines, unless they share its disk.
            for turn in (self.is_world_process_zero(), self.is_local_process_zero()):
                self.accelerator.wait_for_everyone()
                if turn and (checkpoint.unfinished(output_dir) / name).is_dir():
                    if (run := running_run()) is not None:
                        write_run(run, checkpoint.unfinished(output_dir) / name)
                    checkpoint.publish(output_dir, name)
        if self.args.should_save:
            checkpoint.remove_oldest(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    return _save_checkpoint


def _name_best_by_its_place(trainer: Any, output_dir: str, name: str) -> None:
    """Where the checkpoint that was just written is the best, say where it is about to be, not where it was written."""
    best, written = trainer.state.best_model_checkpoint, checkpoint.unfinished(output_dir) / name
    if best is not None and Path(best) == written:
        trainer.state.best_model_checkpoint = str(Path(output_dir) / name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(written / TRAINER_STATE_NAME))


@contextmanager
def _output_dir(trainer: Any, folder: Path) -> Iterator[None]:
    trainer._get_output_dir = lambda trial=None: str(folder)  # hides the class's method
    try:
        yield
    finally:
        del trainer._get_output_dir


def _go_on_from_newest_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, PeftModel):
            if self.is_local_process_zero():
                checkpoint.discard_unfinished(self.args.output_dir)
            if resume_from_checkpoint is True:
                resume_from_checkpoint = _newest_whole(self)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _make_no_step_after_the_last(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        # Only where the weights lie in the model itself: DeepSpeed's engine, which holds them else, is made in train().
        if not isinstance(resume_from_checkpoint, str) or not isinstance(self.model, PeftModel) or self.args.deepspeed:
            return original(self, resume_from_checkpoint, *args, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        same_length = state.num_train_epochs == self.args.num_train_epochs
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps if same_length else math.inf
        if state.global_step < last and not _has_stopped_early(self, state):
            return original(self, resume_from_checkpoint, *args, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    return train


def _has_stopped_early(trainer: Any, state: TrainerState) -> bool:
    callbacks = trainer.callback_handler.callbacks
    return any(each.has_run_out(trainer.args, state) for each in callbacks if isinstance(each, EarlyStopping))


def _newest_whole(trainer: Any) -> str:
    found = decided_by_first(
        trainer.is_world_process_zero(), lambda: str(checkpoint.newest_whole(trainer.args.output_dir, check_usable))
    )
    if trainer.is_world_process_zero():
        print(f"going on from {found}", flush=True)
    return found


def _load_projector_too(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        original(self, resume_from_checkpoint, model)
        if isinstance(self.model, PeftModel):
            _load_beside(self.model.get_base_model(), Path(resume_from_checkpoint))

    return _load_from_checkpoint


def _load_beside_the_best_too(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_best_model(self: Any) -> None:
        original(self)
        if not isinstance(self.model, PeftModel):
            return
        best = Path(self.state.best_model_checkpoint)
        if not self.is_deepspeed_enabled:  # which has loaded all that was trained
            _load_beside(self.model.get_base_model(), best)
        if self.is_world_process_zero():
            told = f"{self.args.metric_for_best_model} {self.state.best_metric:.4g}"
            print(f"the best checkpoint, {best.name} ({told}), becomes the output of this run", flush=True)

    return _load_best_model


def _load_beside(model: Any, checkpoint: Path) -> None:
    ours = {name: parameter.shape for name, parameter in model.named_parameters()}
    beside = {}
    for name, tensor in read_non_lora_trainables(checkpoint).items():
        layer, _, leaf = name.rpartition(".")
        place = name if name in ours else f"{layer}.base_layer.{leaf}"  # of an adapted layer's bias
        if ours.get(place) != tensor.shape:
            here = f"is {list(ours[place])} here" if place in ours else "this model does not have"
            raise MixLoraError(
                f"{checkpoint / NON_LORA_TRAINABLES} holds {name!r} of shape {list(tensor.shape)}, which {here}; go on "
                "with the flags of the run that wrote it, or choose another --output_dir"
            )
        beside[place] = tensor
    model.load_state_dict(beside, strict=False)


def _stop_where_it_stopped(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _run_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        original(self, *args, **kwargs)

    return _run_epoch


PATCHES = (
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.__init__",
        kind=FAULT,
        why="a run that is told to end (SIGTERM) should save first",
        replace=_save_on_termination,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._get_train_sampler",
        kind=FAULT,
        why="a run that goes on from a checkpoint should see the data in the order of the run that wrote it",
        replace=_repeat_order,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.save_model",
        kind=FAULT,
        why="checkpoint-N should hold what the final output holds: adapter, config.json and projector",
        replace=_save_what_train_saves,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._save_checkpoint",
        kind=FAULT,
        why="a crash while a checkpoint is written should leave none rather than a half one",
        replace=_save_aside_then_rename,
        parameters=("model", "trial"),
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.train",
        kind=FAULT,
        why="Trainer makes one step too many when it goes on from the checkpoint of the last step",
        replace=_make_no_step_after_the_last,
        requires={"transformers": "<5"},
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.train",
        kind=FAULT,
        why="train() goes on from the newest checkpoint, even when that one is damaged",
        replace=_go_on_from_newest_whole,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._load_from_checkpoint",
        kind=FAULT,
        why="Trainer loads the adapter alone, so a run that goes on would forget the projector",
        replace=_load_projector_too,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._load_best_model",
        kind=FAULT,
        why="Trainer loads the adapter alone, so the best adapter would be saved with the last projector",
        replace=_load_beside_the_best_too,
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._run_epoch",
        kind=FAULT,
        why="Trainer makes one step too many when it goes on from the checkpoint of the last step",
        replace=_stop_where_it_stopped,
        requires={"transformers": ">=5"},
    ),
)
