"""What a run of adapters trains: the adapter, and what LLaVA stores beside it. Nothing of the base."""

from __future__ import annotations

import inspect

from peft import PeftModel

from ..errors import MixLoraError

BESIDE = ("mm_projector", "embed_tokens", "lm_head", "modules_to_save")
"""Parts of the names that `get_peft_state_non_lora_maybe_zero_3` stores beside an adapter, and that may be trained."""


def _freeze_what_gets_no_gradient(model: PeftModel) -> None:
    """Freeze a vision tower that runs under `torch.no_grad()`: some make parameters anew after they have frozen it."""
    llava = model.get_base_model()
    tower = llava.get_vision_tower() if hasattr(llava, "get_vision_tower") else None
    if tower is None or "no_grad" not in inspect.getsource(type(tower).forward):
        return
    if not all(parameter.requires_grad for parameter in tower.parameters()):  # else a flag unfroze it
        tower.requires_grad_(False)


def check_trainable(model: PeftModel) -> None:
    """Refuse a model whose adapter is frozen, or of whose base more than LLaVA's own is trained.

    Raises:
        MixLoraError: names the flags that lead to it, or the first parameter of the base and their number.
    """
    _freeze_what_gets_no_gradient(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = model.peft_config[model.active_adapter]
    prefix = model.base_model.prefix
    if not any(prefix in name for name in trained):
        raise MixLoraError(
            f"nothing of the {config.peft_type.value} adapter would be trained; leave out --tune_mm_mlp_adapter, "
            "--mm_tunable_parts and whatever else freezes the model"
        )
    has_bias = config.bias != "none"
    of_base = [
        name
        for name in trained
        if prefix not in name and not any(part in name for part in BESIDE) and not (has_bias and name.endswith(".bias"))
    ]
    if of_base:
        raise MixLoraError(
            f"{len(of_base)} parameters of the base would be trained beside the adapter, such as {of_base[0]}; leave "
            "out --mm_tunable_parts, --unfreeze_mm_vision_tower and whatever else unfreezes the model"
        )
