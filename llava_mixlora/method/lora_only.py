"""What PEFT's LoRA can do and MixLoRA cannot: each says in one line what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import MixLoraError


class OfLoraModels:
    """Methods of `peft.LoraModel` that a mixture has no meaning for.

    Raises:
        MixLoraError: always.
    """

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Routers that choose among the factors of one adapter say nothing of another's, nor of a mean of both."""
        raise MixLoraError(
            "add_weighted_adapter: MixLoRA adapters cannot be averaged, since the routers of each choose among its own "
            "factors; activate several with model.base_model.set_adapter([...]), whose updates add up, name one per "
            "instance with adapter_names=[...], or make a LoRA of each with `llava-mixlora export-lora` and average "
            "those"
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> NoReturn:
        """No start of MixLoRA changes the base."""
        raise MixLoraError(
            "subtract_mutated_init: MixLoRA never changes its base, so there is nothing to take off; save_pretrained() "
            "saves an adapter that fits the base as it is, without path_initial_model_for_weight_conversion"
        )


class OfLoraLayers:
    """Methods of `peft.tuners.lora.LoraLayer` that a mixture has no meaning for.

    Raises:
        MixLoraError: always.
    """

    def set_scale(self, adapter: str, scale: float) -> NoReturn:
        """The statistics for merging hold updates of the scale that they were trained with."""
        raise _unscalable("set_scale")

    def scale_layer(self, scale: float) -> NoReturn:
        """See [`set_scale`]."""
        raise _unscalable("scale_layer")

    def unscale_layer(self, scale: float | None = None) -> NoReturn:
        """See [`set_scale`]."""
        raise _unscalable("unscale_layer")

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any = True) -> NoReturn:
        """A fresh adapter has fresh statistics too."""
        raise MixLoraError(
            f"reset_lora_parameters: a MixLoRA layer has no LoRA parameters; for a fresh adapter call "
            f"delete_adapter({adapter_name!r}) and add_adapter({adapter_name!r}, MixLoraConfig(...))"
        )


def _unscalable(name: str) -> MixLoraError:
    return MixLoraError(
        f"{name}: the scale of a loaded MixLoRA adapter is fixed at lora_alpha / r, with which its statistics for "
        "merging were counted; load it with another: config = MixLoraConfig.from_pretrained(FOLDER), config.lora_alpha "
        "= ..., PeftModel.from_pretrained(base, FOLDER, config=config)"
    )
