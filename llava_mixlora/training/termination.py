"""SIGTERM, with which schedulers and clouds take a machine back, and Ctrl-C: save a checkpoint, then end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoint import checkpoints

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for a program that SIGTERM ended
GOES_ON = "the same command goes on from it"
ONE_PRESS = 2.0  # seconds: a terminal and a launcher may both pass on the same Ctrl-C


class SaveOnTermination(TrainerCallback):
    """On SIGTERM, finishes the step, saves a checkpoint and ends the program with status 143.

    On Ctrl-C it does the same and raises `KeyboardInterrupt`; Ctrl-C again ends the program at once. With several
    processes, all of them save as soon as one has got the signal. Outside of `train()` the signals have their usual
    effect; in a thread other than the main one, where Python cannot catch signals, always.
    """

    def __init__(self) -> None:
        self._received = self._ending = 0  # numbers of signals
        self._first = 0.0
        self._usual: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to listen."""
        self._received = self._ending = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
                    self._usual[number] = signal.signal(number, self._receive)

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
            KeyboardInterrupt: after Ctrl-C.
        """
        if not self._ending:
            return
        saved = f"saved step {state.global_step} in {args.output_dir}; {GOES_ON}"
        if self._ending == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        if state.is_world_process_zero:
            print(f"SIGTERM: {saved}")
        raise SystemExit(EXIT_STATUS)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals their usual effect back, but for a Ctrl-C that the result is still to be written before."""
        for number, usual in self._usual.items():
            waits = number == signal.SIGINT and _waiting is not None
            signal.signal(number, _wait if waits else usual)
        self._usual.clear()

    def _receive(self, number: int, frame: Any) -> None:
        if number == self._received == signal.SIGINT and time.monotonic() - self._first > ONE_PRESS:
            raise KeyboardInterrupt
        if not self._received:
            self._first = time.monotonic()
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(1, b"Ctrl-C: this step is finished and saved first; Ctrl-C again ends at once\n")
        self._received = max(self._received, number)


@contextmanager
def interruptible(output_dir: str | None) -> Iterator[None]:
    """Around a whole `train()`: Ctrl-C says what is kept in `output_dir`, and waits for a result that is being written.

    Raises:
        KeyboardInterrupt: with that as its message.
    """
    global _waiting
    usual, _waiting = signal.getsignal(signal.SIGINT), []
    try:
        yield
        if _waiting:
            raise KeyboardInterrupt(f"training had ended, and {output_dir} holds its result")
    except KeyboardInterrupt as interrupt:
        if str(interrupt) or output_dir is None:
            raise
        kept = next(iter(checkpoints(output_dir)), None)
        raise KeyboardInterrupt(f"{kept} is kept; {GOES_ON}" if kept else "nothing was saved yet") from None
    finally:
        if signal.getsignal(signal.SIGINT) is _wait:
            signal.signal(signal.SIGINT, usual)
        _waiting = None


_waiting: list[int] | None = None
"""Signals that came while a train() wrote its result; None outside of one."""


def _wait(number: int, frame: Any) -> None:
    if _waiting is not None:
        _waiting.append(number)


def _any_process(received: int, device: torch.device) -> int:
    """The largest of the numbers of signals that the processes have received; 0 for none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return received
    largest = torch.tensor(received, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)
