"""Which evaluation of a run was the best: its checkpoint is kept, and a run that no longer gets better ends."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .held_out import PREFIX


def evaluations(args: TrainingArguments, state: TrainerState) -> list[float]:
    """The values of `--metric_for_best_model` so far, also those from before a run went on from a checkpoint."""
    name = PREFIX + (args.metric_for_best_model or "").removeprefix(PREFIX)
    return [float(entry[name]) for entry in state.log_history if name in entry]


def evaluations_since_best(values: list[float], greater_is_better: bool | None) -> int:
    """How many values have come after the best one, the first of equals; all of them where none is a number."""
    best, since = None, 0
    for value in values:
        if value == value and (best is None or (value > best if greater_is_better else value < best)):
            best, since = value, 0
        else:
            since += 1
    return since


class KeepBest(TrainerCallback):
    """Evaluates after the last step, and with `--load_best_model_at_end` saves after each evaluation that is the best.

    A Trainer only takes a checkpoint for the best that was due to be saved anyway.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for the evaluation that a Trainer before transformers 5 leaves out: that of what training ends with."""
        strategy = getattr(args, "eval_strategy", None) or args.evaluation_strategy
        if state.global_step >= state.max_steps and strategy == "steps" and args.eval_delay <= state.global_step:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint of what has just been found the best."""
        if args.load_best_model_at_end and not evaluations_since_best(evaluations(args, state), args.greater_is_better):
            control.should_save = True


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations in a row that were not better than the best before them.

    Unlike transformers' `EarlyStoppingCallback` it counts in the run's history, so a run that goes on from a checkpoint
    has the patience that was left, and one that had ended makes no further step.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def has_run_out(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the evaluations so far end the run."""
        return evaluations_since_best(evaluations(args, state), args.greater_is_better) >= self.patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a run that goes on from a checkpoint behind its end."""
        control.should_training_stop = control.should_training_stop or self.has_run_out(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run once it is time, and say so."""
        if self.has_run_out(args, state):
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(
                    f"step {state.global_step}: no better {args.metric_for_best_model} in {self.patience} evaluations; "
                    "training ends (--early_stopping_patience)",
                    flush=True,
                )
