"""A MixLoRA adapter on disk: what `llava.train.train` writes, read back with errors a user can act on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import MixLoraError
from ..inputs import read_json
from ..method.config import MixLoraConfig
from ..method.registration import MIXLORA
from ..method.tensor_names import PEFT_PREFIX

NON_LORA_TRAINABLES = "non_lora_trainables.bin"
"""File in which LLaVA saves what was trained beside the adapter: the projector (`llava.train.train.train`).

And what else its base lacks: the embeddings and the head, where training has given the vocabulary further tokens.
"""
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


def is_mixlora_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds a PEFT adapter of type MIXLORA."""
    try:
        config = json.loads((Path(folder) / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == MIXLORA.value


def read_config(folder: str | Path) -> MixLoraConfig:
    """The configuration of the MIXLORA adapter in `folder`.

    Raises:
        MixLoraError: there is no such folder or it holds no MIXLORA adapter, the configuration is damaged, or a newer
            version of this package saved it.
    """
    file = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        raise MixLoraError(f"{folder}: no such folder; expected a MIXLORA adapter")
    if not file.is_file():
        raise MixLoraError(f"{folder} is no MIXLORA adapter: it has no {CONFIG_NAME}")
    peft_type = read_json(file).get("peft_type")
    if peft_type != MIXLORA.value:
        raise MixLoraError(f"{folder} is no MIXLORA adapter: its {CONFIG_NAME} says peft_type={peft_type!r}")
    try:
        return MixLoraConfig.from_pretrained(str(folder))
    except MixLoraError as error:
        raise MixLoraError(f"{file}: {error}") from error
    except (TypeError, ValueError) as error:
        raise MixLoraError(f"{file} is damaged ({error}); copy it again") from error


def check_adapter(folder: str | Path) -> None:
    """Read the adapter's file headers, so that a damaged file is named before a base model is loaded.

    Raises:
        MixLoraError: `adapter_model.safetensors` is missing, truncated or not safetensors.
    """
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise MixLoraError(f"{weights} is missing; the adapter is incomplete, copy it again or train again")
    try:
        with safe_open(str(weights), framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise MixLoraError(f"{weights} is damaged ({error}); copy it again or train again") from error


def read_non_lora_trainables(folder: str | Path) -> dict[str, Tensor]:
    """The tensors trained beside the adapter, keyed as in the bare LLaVA model; empty when there is no such file.

    Raises:
        MixLoraError: the file cannot be read.
    """
    file = Path(folder) / NON_LORA_TRAINABLES
    if not file.is_file():
        return {}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MixLoraError(f"{file} is damaged ({reason}); copy it again or train again") from error
    # LLaVA saves the names of the model inside its PeftModel: base_model.model.model.mm_projector...
    bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in bare.items()}  # biases of adapted layers
