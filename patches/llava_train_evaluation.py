"""`llava.train.train`: the flags of held-out data, and the data set that they name (LLaVA's `eval_dataset` is None)."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from llava_mixlora.errors import MixLoraError
from llava_mixlora.llava_package import DATA_SET, TRAIN, part
from llava_mixlora.training.best_checkpoint import EarlyStopping, KeepBest
from llava_mixlora.training.held_out import HeldOutCollator, HeldOutData, HeldOutMetrics, description, tasks_of
from llava_mixlora.training.task_labels import TaskLabels

from .llava_train import running_arguments, with_flags
from .patch import METHOD, Patch

NO = "no"


@dataclass
class HeldOutArguments:
    """Flags next to transformers' `--eval_strategy --eval_steps --load_best_model_at_end --metric_for_best_model`."""

    eval_data_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "Held-out data in LLaVA's format: eval_loss, eval_exact_match and, by the field 'task' of samples, "
            "eval_exact_match_TASK are logged every --eval_steps (default: when checkpoints are saved) and at the end."
        },
    )
    eval_image_folder: Optional[str] = field(
        default=None, metadata={"help": "Images of --eval_data_path. Default: --image_folder."}
    )
    early_stopping_patience: Optional[int] = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better --metric_for_best_model (default: loss)."
        },
    )

    def __post_init__(self) -> None:
        patience = self.early_stopping_patience
        if patience is not None and patience < 1:
            raise MixLoraError(f"--early_stopping_patience {patience}: expected a number of evaluations of at least 1")
        if self.eval_data_path is not None:
            self._choose_when()
            if patience is not None and self.metric_for_best_model is None:
                self.metric_for_best_model = "loss"
            if self.load_best_model_at_end and self.save_total_limit == 1:
                # Left at 1, a Trainer ends with the best checkpoint alone, and the same command would train from there.
                self.save_total_limit = 2
        try:
            super().__post_init__()
        except ValueError as error:
            if isinstance(error, MixLoraError) or "--load_best_model_at_end" not in str(error):
                raise
            raise MixLoraError(" ".join(str(error).split())) from error

    def _choose_when(self) -> None:
        """Evaluate when checkpoints are saved, unless asked otherwise; "no", which is in upstream's scripts, is not."""
        names = [name for name in ("evaluation_strategy", "eval_strategy") if hasattr(self, name)]
        strategy = next((given for name in names if (given := getattr(self, name)) not in (None, NO)), None)
        if strategy is None:
            as_saved = self.save_strategy if self.save_strategy in ("steps", "epoch") else "epoch"
            strategy = "steps" if self.eval_steps else as_saved
            if strategy == "steps" and not self.eval_steps:
                self.eval_steps = self.save_steps
        for name in names:
            setattr(self, name, None)
        setattr(self, names[-1], strategy)


def _add_held_out_data(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
        module, flags = original(tokenizer=tokenizer, data_args=data_args), running_arguments()
        data = None if flags is None else flags.eval_data_path
        if data is None:
            return module
        data_args = copy.copy(data_args)
        data_args.image_folder = flags.eval_image_folder or data_args.image_folder
        samples = part(f"{TRAIN}:{DATA_SET}")(data_path=data, tokenizer=tokenizer, data_args=data_args)
        held_out = HeldOutData(samples, tasks_of(samples.list_data_dict, data))
        if os.environ.get("RANK", "0") == "0":
            print(description(held_out, module["train_dataset"], data), flush=True)
        collator = module["data_collator"]
        callbacks = [KeepBest()]
        if flags.early_stopping_patience is not None:
            callbacks.append(EarlyStopping(flags.early_stopping_patience))
        return {
            **module,
            "eval_dataset": held_out,
            "data_collator": HeldOutCollator(
                collator, collator.collator if isinstance(collator, TaskLabels) else collator
            ),
            "compute_metrics": HeldOutMetrics(held_out.tasks, data),
            "callbacks": callbacks,
        }

    return make_supervised_data_module


PATCHES = (
    Patch(
        "llava.train.train:TrainingArguments",
        kind=METHOD,
        why="train() parses its flags into this class, and has none for held-out data (haotian-liu/LLaVA#1536 #1717)",
        replace=with_flags(HeldOutArguments),
        parameters=("eval_steps", "load_best_model_at_end", "metric_for_best_model", "save_strategy", "save_steps"),
    ),
    Patch(
        "llava.train.train:make_supervised_data_module",
        kind=METHOD,
        why="what it returns goes to the Trainer, and holds no data to evaluate on",
        replace=_add_held_out_data,
        parameters=("tokenizer", "data_args"),
    ),
)
