"""MixLoRA in ms-swift: `--external_plugins` with this file's path, and `--tuner_type mixlora`.

`python -m llava_mixlora.integrations.ms_swift` prints the path.
"""

# ruff: noqa: E402 -- a missing framework is told of before it is imported

import contextlib
import os
import sys
from typing import Any

from llava_mixlora.integrations.framework_settings import NAME, check_continues, make_config, refuse, require

if __name__ == "__main__":
    print(os.path.abspath(__file__))
    sys.exit()
require("swift", "ms-swift", "swift.tuner_plugin")  # of ms-swift 4

from peft import PeftModel, TaskType, get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from llava_mixlora.training.routing_callback import RoutingCallback

with contextlib.suppress(ValueError):
    sys.path.remove(
        os.path.dirname(os.path.abspath(__file__))
    )  # ms-swift puts the folder of a plugin before all others

OF_LORA_ALONE = "use_dora", "use_rslora", "lorap_lr_ratio", "target_parameters", "use_swift_lora"
TASKS = {"RERANKER": TaskType.SEQ_CLS, "GENERATIVE_RERANKER": TaskType.CAUSAL_LM, "DECISION": TaskType.CAUSAL_LM}


class MixLoraTuner(PeftTuner):
    """Trains, saves and loads adapters of the type MIXLORA.

    `--lora_rank`, `--lora_alpha`, `--lora_dropout`, `--target_modules` and the like, and their defaults, mean what they
    mean for LoRA; what MixLoRA has beside them comes first and stands in
    `--model_kwargs '{"mixlora": {"num_factors": 16}}'`.
    """

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        """A new adapter on the model.

        Raises:
            MixLoraError: a setting is unknown, is for LoRA alone, or cannot be.
        """
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

        refuse({name: getattr(args, name, None) for name in OF_LORA_ALONE})
        refuse({"init_weights": None if args.init_weights in (True, "true") else args.init_weights})
        refuse({"tuner_backend": None if args.tuner_backend == "peft" else args.tuner_backend})
        task = args.task_type.upper()
        # Of a model that sees, MixLoRA's default is what ms-swift adapts where it is told of nothing else to thaw.
        usual = (
            args.target_modules == ["all-linear"] and args.freeze_vit and args.freeze_aligner and not args.freeze_llm
        )
        of_lora = {
            "r": args.lora_rank,
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
            "bias": args.lora_bias,
            "target_modules": None if usual else get_target_modules(args, model),
            "modules_to_save": get_modules_to_save(args, model, task) or None,
            "task_type": TASKS.get(task, task if task in TaskType.__members__ else None),
        }
        return get_peft_model(model, make_config((args.model_kwargs or {}).get(NAME), of_lora))

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> PeftModel:
        """The model with an adapter from a folder; ms-swift's checkpoints hold it as PEFT saves it.

        Raises:
            MixLoraError: the folder holds no MixLoRA adapter.
        """
        check_continues(None, model_id)
        return PeftModel.from_pretrained(model, model_id, **kwargs)


class RoutingLogs(RoutingCallback):
    """`--callbacks mixlora`: logs how routers use the factors, and sums that over the processes."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()


tuners_map[NAME] = MixLoraTuner
callbacks_map[NAME] = RoutingLogs
