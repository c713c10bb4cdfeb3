"""Which layers are adapted where nothing is said: every linear layer of the language model's decoder.

Never those of a vision tower or a projector, nor the head. The experts of a mixture and what routes to them are left
out too: a layer that gets the tokens of all instances in an order of the mixture's cannot tell whose they are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

_OTHER_MODALITY = re.compile(r"(vision|visual|image|img|mm|multi_?modal|audio|speech|video)(_.*)?")
_EXPERTS = "experts"
"""What transformers calls a mixture's experts, a list of modules or one module that holds all as one tensor."""


def default_targets(model: nn.Module, by_index: bool = False) -> set[str] | str | None:
    """`target_modules` for every linear layer of the model's decoder; None where it has none.

    The last parts of their names, if these name nothing else; otherwise a regular expression or, where layers are to be
    chosen `by_index` afterwards, the names without their first part.
    """
    decoder = decoder_of(model)
    if decoder is None:
        return None
    prefix, trunk = decoder
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    wanted = {f"{prefix}{name}" for name, module in _own_linears(trunk) if module is not head}
    if not wanted:
        return None
    _tell_of_experts(prefix, trunk)
    names = {name for name, _ in model.named_modules()}
    last_parts = {name.rpartition(".")[2] for name in wanted}
    if not _sees(model) and wanted == {name for name in names if name.rpartition(".")[2] in last_parts}:
        return last_parts
    if by_index:
        return {name.partition(".")[2] for name in wanted}
    patterns = sorted({re.sub(r"\b\d+(?=\\\.)", r"\\d+", re.escape(name.removeprefix(prefix))) for name in wanted})
    place = prefix.rstrip(".").rpartition(".")[2]
    expression = rf"(.*\.)?{re.escape(place)}\.({'|'.join(patterns)})" if place else "|".join(patterns)
    found = {name for name in names if re.fullmatch(expression, name)}
    return expression if found == wanted else wanted


def decoder_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The language model's decoder and what precedes the names of its modules in the model's; None where there is none.

    It is what `get_decoder()` gives, or, where that holds more than the decoder (a tower in upstream's LLaVA and in
    transformers before 5), or is not there (transformers 4.37), the module in it that holds the token embeddings.
    """
    trunk = _given_decoder(model)
    if trunk is None or not _generates(model, trunk):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    if id(trunk) not in names:
        return None
    prefix = f"{names[id(trunk)]}.".lstrip(".")
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in trunk.named_modules():
        parent = name.rpartition(".")[0]
        if module is embeddings and parent and any(_own_linears(trunk.get_submodule(parent))):
            return f"{prefix}{parent}.", trunk.get_submodule(parent)
    return prefix, trunk


def _given_decoder(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_decoder"):
        return model.get_decoder()
    return model if isinstance(model, PreTrainedModel) else None


def _generates(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether a model, or one of its kind, writes text; transformers gives encoders a `get_decoder` too."""
    if not isinstance(model, PreTrainedModel) or model.can_generate():
        return True
    kind = getattr(getattr(decoder, "config", None), "model_type", None)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _sees(model: nn.Module) -> bool:
    """Whether the model has a tower, or may be given one after it was adapted, as LLaVA is."""
    config = getattr(model, "config", None)
    return any(getattr(config, name, None) for name in ("vision_config", "mm_vision_tower", "audio_config"))


def _own_linears(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a decoder by their names in it, adapted ones included, without what is not to be adapted."""
    skipped = [name for name, child in trunk.named_children() if _OTHER_MODALITY.fullmatch(name)]
    for name, module in trunk.named_modules():
        if any(name == other or name.startswith(f"{other}.") for other in skipped):
            continue
        if hasattr(module, _EXPERTS):
            skipped.append(f"{name}.{_EXPERTS}".lstrip("."))
            # Beside them is what routes to them, or how much a shared expert counts.
            skipped += [f"{name}.{inner}".lstrip(".") for inner, child in module.named_children() if _is_linear(child)]
        if _is_linear(module):
            skipped.append(name)
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, quantized or adapted or not; quantized ones are known by their sizes."""
    if isinstance(module, (nn.Linear, BaseTunerLayer)) or type(module).__name__ == "Conv1D":
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, nn.Bilinear)


def _tell_of_experts(prefix: str, trunk: nn.Module) -> None:
    mixtures = [f"{prefix}{name}.{_EXPERTS}" for name, module in trunk.named_modules() if hasattr(module, _EXPERTS)]
    if mixtures:
        among = f"{mixtures[0]} and {len(mixtures) - 1} more" if len(mixtures) > 1 else mixtures[0]
        warnings.warn(
            f"target_modules is unset, and the experts of mixtures ({among}) are left out: their rows are tokens of "
            "all instances, whose routes are not known there",
            stacklevel=2,
        )
