"""What tells a base model or a vision tower from another one: its configuration, its tokenizer, some of its weights.

Each part is compared where both sides know it. It holds where the model lies, how its files are cut into shards,
whether they are safetensors or pickles, and which version of transformers wrote their configuration.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import MixLoraError
from ..inputs import read_json
from .config_file import config_file
from .stored_weights import weight_files

OF_THE_RESULT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "head_dim"),
    *("image_size", "patch_size", "layer_norm_eps", "projection_dim"),
)
"""Fields of a model's configuration that decide what it computes; others tell how it was stored."""
OF_AN_IMAGE = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
NUMBERS = 256  # that are taken of each weight
NOT_ITS_OWN = ("vision_tower.", "rotary_emb.")
"""Parts of a checkpoint that some versions store and some do not."""


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a model; empty or None what is not.

    Args:
        config: the fields of [`OF_THE_RESULT`] that its `config.json` has.
        weights: SHA-256 over [`NUMBERS`] numbers of every weight matrix, rounded to bfloat16.
        tokenizer: SHA-256 of the vocabulary, by the file that holds it.
        image_processing: the fields of [`OF_AN_IMAGE`] that its `preprocessor_config.json` has.
    """

    config: dict[str, Any]
    weights: str | None = None
    tokenizer: dict[str, str] | None = None
    image_processing: dict[str, Any] | None = None

    def differences(self, recorded: Fingerprint) -> list[str]:
        """In words, how this model differs from the one on record."""
        found = [
            f"its {name} is {_shown(self.config[name])} and not {_shown(recorded.config[name])}"
            for name in OF_THE_RESULT
            if name in self.config and name in recorded.config and self.config[name] != recorded.config[name]
        ]
        if None not in (self.weights, recorded.weights) and self.weights != recorded.weights:
            found.append("its weights differ")
        common = set(self.tokenizer or ()) & set(recorded.tokenizer or ())
        if common and not any(self.tokenizer[file] == recorded.tokenizer[file] for file in common):
            found.append(f"its tokenizer differs ({', '.join(sorted(common))})")
        ours, theirs = self.image_processing or {}, recorded.image_processing or {}
        found += [
            f"it processes images with {name} {_shown(_sizes(ours[name]))} and not {_shown(_sizes(theirs[name]))}"
            for name in OF_AN_IMAGE
            if name in ours and name in theirs and _sizes(ours[name]) != _sizes(theirs[name])
        ]
        return found


@cache
def fingerprint(model: str, cache_dir: str | None = None) -> Fingerprint | None:
    """Of a folder, or of a hub name that has been downloaded or can be; None where it has no readable `config.json`.

    Reads some hundred kilobytes of the weights, so it takes a second at 7B.
    """
    file = config_file(model, cache_dir)
    if file is None:
        return None
    contents = read_json(file)
    of_tower = contents.get("vision_config")  # of a CLIP with its text model, as OpenAI's are stored
    contents = of_tower if of_tower and isinstance(of_tower, dict) else contents
    folder = file.parent
    return Fingerprint(
        config={name: contents[name] for name in OF_THE_RESULT if contents.get(name) is not None},
        weights=weights_fingerprint(folder),
        tokenizer=_tokenizer(folder),
        image_processing=_image_processing(folder),
    )


def weights_fingerprint(folder: Path) -> str | None:
    """Of all weight matrices of a checkpoint's folder; None where they cannot be read without reading all of them."""
    try:
        parts = dict(sorted(part for file in weight_files(folder) for part in _parts_of(file)))
    except Exception:  # no weights here, or damaged ones, which loading them will name
        return None
    found = hashlib.sha256()
    for name, part in parts.items():
        found.update(name.encode() + part)
    return found.hexdigest() if parts else None


def fingerprint_of_file(file: Path) -> str | None:
    """Of all matrices in one file of weights, such as an adapter's; None where it cannot be read."""
    try:
        parts = dict(sorted(_parts_of(file)))
    except Exception:  # damaged: loading it will name that
        return None
    found = hashlib.sha256()
    for name, part in parts.items():
        found.update(name.encode() + part)
    return found.hexdigest() if parts else None


def _parts_of(file: Path) -> Iterator[tuple[str, bytes]]:
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as tensors:
            names = tensors.keys()  # the file itself cannot be iterated over
            for name in names:
                stored = tensors.get_slice(name)
                if len(stored.get_shape()) >= 2 and not _is_elsewhere(name):
                    yield name, _part(stored, stored.get_shape())
    elif zipfile.is_zipfile(file):
        for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
            if isinstance(tensor, Tensor) and tensor.dim() >= 2 and not _is_elsewhere(name):
                yield name, _part(tensor, list(tensor.shape))
    else:
        raise MixLoraError(f"{file} can only be read whole")


def _is_elsewhere(name: str) -> bool:
    return any(part in name for part in NOT_ITS_OWN)


def _part(stored: Any, shape: list[int]) -> bytes:
    # A row of the middle: the first ones of an embedding are often zero.
    row = stored[shape[0] // 2 : shape[0] // 2 + 1].reshape(-1)[:NUMBERS]
    kind = torch.bfloat16 if row.is_floating_point() else row.dtype  # what float16 and bfloat16 copies have in common
    return f"{shape}".encode() + row.to(kind).contiguous().view(torch.uint8).numpy().tobytes()


def _tokenizer(folder: Path) -> dict[str, str] | None:
    found = {}
    if (folder / "tokenizer.model").is_file():
        found["tokenizer.model"] = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    if (folder / "tokenizer.json").is_file():
        # What else is in it depends on the version that wrote it.
        model = read_json(folder / "tokenizer.json").get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        found["tokenizer.json"] = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
    return found or None


def _image_processing(folder: Path) -> dict[str, Any] | None:
    file = folder / "preprocessor_config.json"
    contents = read_json(file) if file.is_file() else {}
    return {name: contents[name] for name in OF_AN_IMAGE if contents.get(name) is not None} or None


def _sizes(value: Any) -> Any:
    """A square's size as one number, which some versions write as `{"height": 336, "width": 336}`."""
    sides = list(value.values()) if isinstance(value, dict) else []
    return sides[0] if sides and sides.count(sides[0]) == len(sides) else value


def _shown(value: Any) -> str:
    return repr(value)[:100]
