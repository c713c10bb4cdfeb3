"""Every change that the plugin makes to upstream programs, applied at run time by [`apply`] and undone by [`undo`].

One module per upstream module; each lists its patches in `PATCHES`. Nothing happens on import.
"""

from llava_mixlora.import_failures import noted
from llava_mixlora.llava_package import used

from . import (
    deepspeed_zero3,
    llava_arch,
    llava_builder,
    llava_cli,
    llava_controller,
    llava_llama,
    llava_mm_utils,
    llava_model_worker,
    llava_train,
    llava_train_data,
    llava_train_evaluation,
    llava_train_saving,
    llava_trainer,
    llava_trainer_checkpoints,
    llava_trainer_evaluation,
    llava_trainer_init_from,
    peft_peft_model,
    peft_save_and_load,
    transformers_auto,
    transformers_code,
    transformers_config,
    transformers_former_names,
    transformers_peft,
    transformers_peft_statistics,
    transformers_trainer,
)
from .patch import KINDS, Patch, PatchError

# LLaVA cannot be imported before transformers has back what it imports, so the order matters.
PATCHES: tuple[Patch, ...] = (
    *transformers_trainer.PATCHES,
    *transformers_former_names.PATCHES,
    *transformers_auto.PATCHES,
    *llava_llama.PATCHES,
    *llava_arch.PATCHES,
    *llava_builder.PATCHES,
    *llava_mm_utils.PATCHES,
    *llava_trainer.PATCHES,
    *llava_trainer_checkpoints.PATCHES,
    *llava_trainer_evaluation.PATCHES,
    *llava_trainer_init_from.PATCHES,
    *llava_train.PATCHES,
    *llava_train_data.PATCHES,
    *llava_train_evaluation.PATCHES,
    *llava_train_saving.PATCHES,
    *llava_cli.PATCHES,
    *llava_model_worker.PATCHES,
    *llava_controller.PATCHES,
    *peft_peft_model.PATCHES,
    *transformers_config.PATCHES,
    *transformers_code.PATCHES,
    *transformers_peft.PATCHES,
    *deepspeed_zero3.PATCHES,
)

OF_THE_METHOD: tuple[Patch, ...] = (*peft_save_and_load.PATCHES, *transformers_peft_statistics.PATCHES)
"""Those that `import llava_mixlora` applies, with LLaVA or without."""

__all__ = ["KINDS", "OF_THE_METHOD", "PATCHES", "Patch", "PatchError", "apply", "undo"]


def apply(program: str | None = None) -> None:
    """Apply every patch that the installed versions need; does nothing the second time.

    Args:
        program: the module that is to be run, in the words of LLaVA itself; patches of programs (see [`Patch`]) are
            applied to that one alone.

    Raises:
        PatchError: a symbol to be replaced is missing, and this run needs it. Nothing stays half patched.
    """
    try:
        with noted(used()):
            for patch in PATCHES:
                if not patch.program or patch.module == program:
                    patch.apply()
    except Exception:
        undo()
        raise


def undo() -> None:
    """Take every applied patch back, last one first."""
    for patch in reversed(PATCHES):
        patch.undo()
