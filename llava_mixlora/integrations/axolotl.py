"""MixLoRA in axolotl: `adapter: mixlora`, with `llava_mixlora.integrations.axolotl.MixLoraPlugin` among its plugins."""

# ruff: noqa: E402 -- a missing framework is told of before it is imported

from __future__ import annotations

from typing import Any

from .framework_settings import NAME, check_continues, check_names, make_config, refuse, require

require("axolotl", "axolotl", "axolotl.integrations.mora")  # of 0.19, as are adapters that a plugin loads

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from pydantic import BaseModel, Field
from transformers import PreTrainedModel, TrainerCallback

from ..errors import MixLoraError
from ..method.config import MixLoraConfig
from ..training.routing_callback import RoutingCallback

OF_LORA_ALONE = (
    *("peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "peft_layer_replication"),
    *("peft_trainable_token_indices", "lora_target_parameters", "lora_fan_in_fan_out", "loraplus_lr_ratio", "relora"),
    *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
)
QUANTIZED = "load_in_4bit", "load_in_8bit"
OVERRIDES = "overrides_of_model_kwargs"


class MixLoraArgs(BaseModel):
    """What the plugin adds to axolotl's settings."""

    mixlora: dict[str, Any] | None = Field(
        default=None, description="Fields of llava_mixlora.MixLoraConfig, for adapter: mixlora."
    )


class MixLoraPlugin(BasePlugin):
    """Makes axolotl train, continue and load adapters of the type MIXLORA.

    `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules` and the like mean what they mean for LoRA, where
    they are set; `mixlora:` holds what MixLoRA has beside them, and comes first.
    """

    def register(self, cfg: Any) -> None:
        """Check the settings before anything is loaded, and have 4-bit and 8-bit bases loaded as for LoRA.

        axolotl asks for the names of its own adapters where it quantizes a base, so this one says itself how.

        Raises:
            MixLoraError: a setting is unknown, is for LoRA alone, cannot be, or has no effect.
        """
        if cfg.get("adapter") != NAME:
            if cfg.get(NAME) is not None:
                raise MixLoraError(f"{NAME}: has no effect with adapter={cfg.get('adapter')!r}; set adapter: {NAME}")
            return
        if cfg.get("merge_lora") and cfg.get("merge_method") != "legacy":
            raise MixLoraError(
                "merge-lora reads LoRA's tensors alone; set merge_method: legacy, which merges a static stand-in for "
                "the MixLoRA adapter, with a loss, or keep the adapter as it is"
            )
        loftq = (cfg.get("peft") or {}).get("loftq_config")
        refuse({"peft.loftq_config": loftq, **{name: cfg.get(name) for name in OF_LORA_ALONE}})
        check_names(cfg.get(NAME))
        if cfg.get("lora_model_dir"):
            check_continues(cfg.get(NAME), cfg["lora_model_dir"])
        else:
            _make_config(cfg, None)
        if any(cfg.get(name) for name in QUANTIZED):
            cfg[OVERRIDES] = {"quantization_config": _quantization(cfg), **(cfg.get(OVERRIDES) or {})}

    def get_input_args(self) -> str:
        """Where the settings of the plugin are described."""
        return f"{__name__}.{MixLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name of the adapter, and that it is not axolotl's own LoRA."""
        return [AdapterCapabilities(name=NAME)]

    def pre_lora_load(self, cfg: Any, model: PreTrainedModel) -> None:
        """Prepare a quantized base for training, as axolotl does for its own adapters."""
        if cfg.adapter == NAME and any(cfg[name] for name in QUANTIZED):
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(cfg.gradient_checkpointing))

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None] | None:
        """A new adapter, or that of `lora_model_dir`, on the model; None where the adapter is another's."""
        if cfg.adapter != NAME:
            return None
        if config_only:
            return None, _make_config(cfg, model)
        kept = (
            {}
            if cfg.peft_autocast_adapter_dtype is None
            else {"autocast_adapter_dtype": cfg.peft_autocast_adapter_dtype}
        )
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **kept)
        else:
            adapted = get_peft_model(model, _make_config(cfg, model), **kept)
        return adapted, adapted.peft_config["default"]

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """What logs how routers use the factors, and sums that over the processes."""
        return [RoutingCallback()] if cfg.adapter == NAME else []


def _make_config(cfg: Any, model: PreTrainedModel | None) -> MixLoraConfig:
    kind = type(model).__name__
    of_heads = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
    task = next((task for name, task in of_heads.items() if name in kind), TaskType.CAUSAL_LM)
    of_lora = {
        "r": cfg.get("lora_r"),
        "lora_alpha": cfg.get("lora_alpha"),
        "lora_dropout": cfg.get("lora_dropout"),
        "target_modules": cfg.get("lora_target_modules") or None,
        "exclude_modules": cfg.get("lora_exclude_modules") or None,
        "modules_to_save": cfg.get("lora_modules_to_save") or None,
        "layers_to_transform": cfg.get("peft_layers_to_transform"),
        "layers_pattern": cfg.get("peft_layers_pattern"),
        "rank_pattern": cfg.get("lora_rank_pattern"),
        "alpha_pattern": cfg.get("lora_alpha_pattern"),
        "task_type": task,
    }
    return make_config(cfg.get(NAME), of_lora)


def _quantization(cfg: Any) -> dict[str, Any]:
    if not cfg.get("load_in_4bit"):
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    of_qlora = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16" if cfg.get("bf16") else "float16" if cfg.get("fp16") else "float32",
    }
    return {**of_qlora, **(cfg.get("bnb_config_kwargs") or {})}
