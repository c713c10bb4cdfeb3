"""A MixLoRA adapter on disk: what `llava.train.train` writes, read back with errors a user can act on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import MixLoraError
from ..inputs import read_json
from ..method.config import MixLoraConfig
from ..method.field_kinds import OF_ANY_ADAPTER, check_kinds
from ..method.registration import MIXLORA
from ..method.tensor_names import PEFT_PREFIX
from ..own_files import own_file
from ..writing import save_tensors
from .pickles import read_state_dict

NON_LORA_TRAINABLES = "non_lora_trainables.bin"
"""File in which LLaVA saves what was trained beside the adapter: the projector (`llava.train.train.train`).

And what else its base lacks: the embeddings and the head, where training has given the vocabulary further tokens.
"""
SAFE_NON_LORA_TRAINABLES = "non_lora_trainables.safetensors"
"""The same tensors in a form that holds no code; it is read first."""
INPUT_EMBEDDINGS = "model.embed_tokens.weight"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

NOT_THE_LANGUAGE_MODEL = r".*(mm_projector|vision_tower|vision_resampler).*"
"""The modules of a LLaVA that no adapter touches, as a regular expression (`llava.train.train.find_all_linear_names`).

Upstream names the kinds of layers only, and a CLIP tower, not loaded yet when train() makes the adapter, has layers of
the same names when the adapter is loaded again.
"""


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter of PEFT's."""
    return os.path.lexists(Path(folder) / CONFIG_NAME)


def is_mixlora_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds a PEFT adapter of type MIXLORA."""
    try:
        return read_fields(folder).get("peft_type") == MIXLORA.value
    except MixLoraError:
        return False


def read_fields(folder: str | Path) -> dict[str, Any]:
    """What the `adapter_config.json` in `folder` says, of whichever type the adapter is.

    Raises:
        MixLoraError: there is none, or it is damaged.
    """
    if not Path(folder).is_dir():
        raise MixLoraError(f"{folder}: no such folder; expected a MIXLORA adapter")
    file = own_file(folder, CONFIG_NAME)
    if file is None:
        raise MixLoraError(f"{folder} is no MIXLORA adapter: it has no {CONFIG_NAME}")
    fields = read_json(file)
    try:
        check_kinds(fields, OF_ANY_ADAPTER)
    except MixLoraError as error:
        raise MixLoraError(f"{file}: {error}") from None
    return fields


def read_config(folder: str | Path) -> MixLoraConfig:
    """The configuration of the MIXLORA adapter in `folder`.

    Raises:
        MixLoraError: there is no such folder or it holds no MIXLORA adapter, the configuration is damaged, or a newer
            version of this package saved it.
    """
    fields, file = read_fields(folder), Path(folder) / CONFIG_NAME
    if fields.get("peft_type") != MIXLORA.value:
        raise MixLoraError(
            f"{folder} is no MIXLORA adapter: its {CONFIG_NAME} says peft_type={repr(fields.get('peft_type'))[:100]}"
        )
    fields.pop("runtime_config", None)
    try:
        return MixLoraConfig.from_peft_type(**fields)
    except MixLoraError as error:
        raise MixLoraError(f"{file}: {error}") from error
    except (TypeError, ValueError) as error:
        raise MixLoraError(f"{file} is damaged ({error}); copy it again") from error


def weights_of(folder: str | Path) -> Path:
    """The file with an adapter's tensors, which are neither read nor checked.

    Raises:
        MixLoraError: it is missing, or is none of the folder's own.
    """
    weights = own_file(folder, SAFETENSORS_WEIGHTS_NAME)
    if weights is None:
        raise MixLoraError(
            f"{Path(folder) / SAFETENSORS_WEIGHTS_NAME} is missing; the adapter is incomplete, copy it again or train "
            "again"
        )
    return weights


def read_non_lora_trainables(folder: str | Path) -> dict[str, Tensor]:
    """The tensors trained beside the adapter, keyed as in the bare LLaVA model; empty when there is no such file.

    Adapters hold them twice, as safetensors and in the file that LLaVA reads; earlier ones in that alone.

    Raises:
        MixLoraError: a file cannot be read or holds code, or the two do not hold the same.
    """
    pickled, safe = own_file(folder, NON_LORA_TRAINABLES), own_file(folder, SAFE_NON_LORA_TRAINABLES)
    states = [read_state_dict(pickled)] if pickled is not None else []
    if safe is not None:
        try:
            states.insert(0, load_file(safe))
        except SafetensorError as error:
            raise MixLoraError(f"{safe} is damaged ({error}); copy it again or train again") from error
    if len(states) == 2 and not _are_same(*states):
        raise MixLoraError(
            f"{safe} and {pickled.name} beside it hold different tensors, so one of them is of another training; "
            "remove the one that is not meant, or copy both again"
        )
    # LLaVA saves the names of the model inside its PeftModel: base_model.model.model.mm_projector...
    bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in (states[0] if states else {}).items()}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in bare.items()}  # biases of adapted layers


def write_non_lora_trainables(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write what was trained beside an adapter, as safetensors and as LLaVA reads it; names are those of LLaVA's file.

    LLaVA's file is the last, by which a finished run is known.
    """
    # Apart from storages that others share, which torch.save would write whole, and safetensors refuse.
    apart = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    save_tensors(apart, Path(folder) / SAFE_NON_LORA_TRAINABLES)
    torch.save(apart, Path(folder) / NON_LORA_TRAINABLES)


def _are_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
