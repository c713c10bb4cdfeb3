"""SIGTERM, with which schedulers and clouds take a machine back: save a checkpoint, then end."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for a program that SIGTERM ended


class SaveOnTermination(TrainerCallback):
    """On SIGTERM, finishes the step, saves a checkpoint and ends the program with status 143.

    With several processes, all of them save as soon as one has got the signal. Outside of `train()` the signal has its
    usual effect; in a thread other than the main one, where Python cannot catch signals, always.
    """

    def __init__(self) -> None:
        self._received = False
        self._ending = False
        self._usual: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to listen."""
        self._received = self._ending = False
        if threading.current_thread() is threading.main_thread():
            self._usual = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint when a process has got the signal."""
        self._ending = _any_process(self._received, args.device)
        if self._ending:
            control.should_save = True
            control.should_evaluate = False  # it may take longer than the time that is left

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the program, once the checkpoint is there.

        Raises:
            SystemExit: with status 143, after a SIGTERM.
        """
        if self._ending:
            if state.is_world_process_zero:
                print(f"SIGTERM: saved step {state.global_step} in {args.output_dir}; the same command goes on from it")
            raise SystemExit(EXIT_STATUS)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signal its usual effect back."""
        if self._usual is not None:
            signal.signal(signal.SIGTERM, self._usual)
            self._usual = None

    def _receive(self, *_: Any) -> None:
        self._received = True


def _any_process(received: bool, device: torch.device) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return received
    flag = torch.tensor(int(received), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)
