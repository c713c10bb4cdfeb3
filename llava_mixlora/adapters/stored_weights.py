"""The weights of a checkpoint folder, read tensor by tensor; no pickled code is ever executed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import MixLoraError
from ..inputs import read_json
from .pickles import read_state_dict

BASE_LAYER = ".base_layer."
"""In the names of weights that an adapter is wrapped around."""


class StoredWeights(Mapping[str, Tensor]):
    """The tensors in a folder by name: `model.safetensors` or `pytorch_model.bin`, whole or sharded.

    A tensor is read from the disk when it is asked for, so a folder larger than the memory can be walked through.

    Raises:
        MixLoraError: there is no weight file, a shard is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file in weight_files(Path(folder)):
            self._readers.update(_safetensors(file) if file.suffix == ".safetensors" else _state_dict(file))

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or its shards.

    Raises:
        MixLoraError: there is none, one is missing, or the list of shards is damaged.
    """
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise MixLoraError(f"{folder / index} is damaged: it names no shards in 'weight_map'; copy it again")
            return [_present(folder / Path(name).name, index) for name in sorted(set(map(str, shards.values())))]
    raise MixLoraError(f"{folder} holds no weights; expected {WEIGHTS_NAME} or {SAFE_WEIGHTS_NAME}, whole or in shards")


def check_is_no_wrapped_model(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that was saved with an adapter around its layers, whose weights have names that no model has.

    A loader finds none of them, and leaves these layers as they were drawn.

    Args:
        folder: of the checkpoint, for the message.
        names: of its tensors.

    Raises:
        MixLoraError: names the first of them, and their number.
    """
    wrapped = [name for name in names if BASE_LAYER in name]
    if wrapped:
        raise MixLoraError(
            f"{folder} has {len(wrapped)} tensors such as {wrapped[0]}: it was saved with an adapter around layers, "
            "and a model finds none of these; expected a whole model: merge its adapter (llava-mixlora merge), or take "
            "the base of its training"
        )


def check_folder_is_no_wrapped_model(folder: str | Path) -> None:
    """As [`check_is_no_wrapped_model`], of a folder; weights that are not there, or pickled, are not looked at."""
    folder = Path(folder)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() or (folder / SAFE_WEIGHTS_NAME).is_file():
        check_is_no_wrapped_model(folder, StoredWeights(folder))
    elif (folder / WEIGHTS_INDEX_NAME).is_file():
        names = read_json(folder / WEIGHTS_INDEX_NAME).get("weight_map")
        check_is_no_wrapped_model(folder, names if isinstance(names, dict) else ())


def equal_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two stored weights are the same, up to what storing them in half precision changes."""
    # The two may have gone through different half precisions; bfloat16 keeps 8 bits.
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)


def _present(shard: Path, index: str) -> Path:
    if not shard.is_file():
        raise MixLoraError(f"{shard} is missing, but {index} names it; is the download complete?")
    return shard


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        tensors = safe_open(str(file), framework="pt")
        names = tensors.keys()  # the file itself cannot be iterated over
        return {name: partial(tensors.get_tensor, name) for name in names}
    except SafetensorError as error:
        raise MixLoraError(f"{file} is damaged ({error}); copy it again") from error


def _state_dict(file: Path) -> dict[str, Callable[[], Tensor]]:
    state = read_state_dict(file, verify=True)
    if not state:
        raise MixLoraError(f"{file} holds no tensors; copy it again")
    return {name: partial(state.__getitem__, name) for name in state}
