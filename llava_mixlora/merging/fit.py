"""Whether an adapter fits its base, and its result the disk: what is known before anything is computed."""

from __future__ import annotations

from pathlib import Path

from ..adapters.base_check import check_base
from ..adapters.its_llava import use_its_llava
from ..adapters.model_choices import AS_NAMED, ModelChoices
from ..adapters.model_folders import base_folder, check_output, check_room
from ..adapters.model_places import base_model_of
from ..adapters.stored_weights import StoredWeights, check_is_no_wrapped_model, weight_files
from ..errors import MixLoraError
from .static_adapter import SavedAdapter

FLAG = "--save-model-path"
BESIDE_THE_WEIGHTS = 64 << 20  # bytes: tokenizer, configuration and report, generously


def check_merge(
    adapter: SavedAdapter,
    model_base: str | None,
    output: Path,
    choices: ModelChoices = AS_NAMED,
    copies_base: bool = True,
) -> Path:
    """What can be known to fail before anything is computed; returns the folder of the base.

    Raises:
        MixLoraError: `output` is there, the base is missing, quantized or another one than the adapter's, or the disk
            has no room for the result.
    """
    check_output(FLAG, output)
    use_its_llava(adapter.folder)
    base = base_folder(base_model_of(adapter.folder, model_base))
    stored = StoredWeights(base)
    check_is_no_wrapped_model(base, stored)
    for name, layer in adapter.items():
        check_fits(f"{name}.weight", [layer.factors_B.shape[1], layer.factors_A.shape[1]], stored, base)
    check_base(adapter.folder, str(base), choices.allow_other_base)
    size = 2 * sum(tensor.nbytes for tensor in adapter.beside.values())  # in two forms beside a LoRA
    size += sum(file.stat().st_size for file in weight_files(base)) if copies_base else 0
    check_room(FLAG, output, size + BESIDE_THE_WEIGHTS)
    return base


def check_fits(name: str, expected: list[int], stored: StoredWeights, base: Path) -> None:
    """Refuse a base whose weight of that name is absent, quantized or of another shape."""
    tensor = stored.get(name)
    found = "absent" if tensor is None else list(tensor.shape)
    if tensor is not None and not tensor.is_floating_point():
        raise MixLoraError(
            f"{base}: its {name} is stored as {tensor.dtype}, so the base is quantized; pass the 16-bit base as "
            "--model-base"
        )
    if found != expected:
        raise MixLoraError(
            f"the adapter is for another base: it changes {name} of shape {expected}, which is {found} in {base}; pass "
            "the --model-base that its training started from"
        )
