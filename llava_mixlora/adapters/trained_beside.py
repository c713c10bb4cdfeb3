"""What training leaves beside a LLaVA's adapter, for models that get the adapter from PEFT or transformers alone."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from ..method.tensor_names import PEFT_PREFIX
from .adapter_folder import NON_LORA_TRAINABLES, SAFE_NON_LORA_TRAINABLES, is_mixlora_adapter, weights_of
from .reading import read_beside

HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def load_trained_beside(model: nn.Module, adapter: str, place: str, others: Collection[str], **options: Any) -> None:
    """Put the projector, and what else was trained beside an adapter that `model` has just got, into the model.

    A model has one projector, so it is that of its first adapter: where `others` are there, theirs stays, with a
    warning if it is another. One that has no place for it, a bare language model, is warned of too.

    Args:
        model: a LLaVA, or a PeftModel of one.
        adapter: the adapter's name in the model.
        place: the folder that the adapter was loaded from, or its name on the hub.
        others: names of the model's other adapters.
        options: of the download, as PEFT takes them; further ones are ignored.

    Raises:
        MixLoraError: it lacks tensors or has strange ones, or its file is damaged or holds code (as `reading.read`).
    """
    folder = _folder(place, options)
    trained = {} if folder is None else read_beside(folder, _config_of(model, adapter))
    if not trained:
        return
    parameters = {_bare(name): parameter for name, parameter in model.named_parameters()}
    if (misfit := _misfit(trained, parameters)) is not None:
        _warn(
            f"{place} was trained together with what lies in its {NON_LORA_TRAINABLES}, of which nothing was loaded: "
            f"{misfit}; load base and adapter with llava.model.builder.load_pretrained_model({place!r}, None, 'llava')"
        )
        return
    news = {name: tensor for name, tensor in trained.items() if not _is_there(tensor, parameters[name])}
    if news and others:
        _warn(
            f"adapter {adapter!r} of {place} was trained with another {_part(news)} than the model has from "
            f"{', '.join(map(repr, sorted(others)))}, which stays: answers of {adapter!r} are not those of its "
            "training; load it into a model of its own"
        )
        return
    with torch.no_grad():
        for name, tensor in news.items():
            parameters[name].copy_(tensor)


def check_weights_are_there(place: str, subfolder: str | None = None) -> None:
    """Refuse the folder of a MIXLORA adapter that has no file of weights, which PEFT would look for on the hub.

    Raises:
        MixLoraError: as [`adapter_folder.weights_of`].
    """
    folder = Path(place, subfolder or "")
    if is_mixlora_adapter(folder):
        weights_of(folder)


def _folder(place: str, options: dict[str, Any]) -> Path | None:
    """The local folder of what lies beside an adapter; None where nothing does."""
    folder = Path(place, options.get("subfolder") or "")
    if folder.is_dir():
        return folder
    given = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    for name in (SAFE_NON_LORA_TRAINABLES, NON_LORA_TRAINABLES):
        try:
            return Path(hf_hub_download(place, name, **given)).parent
        except Exception:  # not there, as for adapters of other models; the adapter itself has been found
            continue
    return None


def _config_of(model: nn.Module, adapter: str) -> Any:
    return (getattr(model, "peft_config", None) or {}).get(adapter)


def _bare(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _misfit(trained: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> str | None:
    for name, tensor in trained.items():
        if name not in parameters:
            return f"the model has no {name}"
        if parameters[name].shape != tensor.shape:
            return f"{name} is {list(tensor.shape)}, and {list(parameters[name].shape)} in the model"
        if parameters[name].is_meta:
            return f"the model's {name} is not in memory"
    return None


def _is_there(tensor: Tensor, parameter: nn.Parameter) -> bool:
    return torch.equal(tensor.to(parameter.device, parameter.dtype), parameter)


def _part(news: dict[str, Tensor]) -> str:
    return "projector" if any("mm_projector" in name for name in news) else next(iter(news))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
