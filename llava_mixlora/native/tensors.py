"""The weights of upstream's LLaVA under the names of transformers' checkpoints, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..errors import MixLoraError
from .names import native_name, stored_name

EMBEDDINGS, HEAD, PROJECTOR = "model.embed_tokens.weight", "lm_head.weight", "model.mm_projector."
TOWER, VISION = "model.vision_tower.vision_tower.", "vision_model."
BY_TOKEN = (EMBEDDINGS, HEAD)
"""Upstream's names of the tensors that have a row for each token."""
NOT_NEEDED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_IN_TOWER = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def grown(tensor: Tensor, rows: int, like: int) -> Tensor:
    """A tensor with a row for each token, [V, d], and further ones up to `rows`, which are copies of the row `like`.

    As copies of the unknown token's they give the new token its score: it is never the likeliest, and the scores of all
    others stay as they are.
    """
    return torch.cat([tensor, tensor[like].expand(rows - len(tensor), -1)]) if len(tensor) < rows else tensor


def native_tensors(
    stored: Mapping[str, Tensor], trained: Mapping[str, Tensor], config: Mapping[str, Any], rows: int, like: int
) -> Iterator[tuple[str, Tensor]]:
    """The language model and the projector by the names of transformers' checkpoints, in the dtypes they have.

    Args:
        stored: the base by upstream's names.
        trained: what takes the place of some of it, or is added to it (a projector).
        config: what the LLaVA's `config.json` says.
        rows: how many tokens the result has; see [`grown`].
        like: the row that further ones are copies of.

    Raises:
        MixLoraError: it has no projector, or one of another form than `config` says.
    """
    names = dict.fromkeys([*stored, *trained])
    projector = [name for name in names if name.startswith(PROJECTOR)]
    layers = {name.removeprefix(PROJECTOR).rpartition(".")[0] for name in projector}
    expected = {"0", "2"} if config.get("mm_projector_type") == "mlp2x_gelu" else {""}
    if layers != expected:
        found = f"layers {sorted(layers)}" if layers else "none"
        raise MixLoraError(
            f"a projector of the form {config.get('mm_projector_type', 'linear')} was expected, and there is {found}: "
            "the language model alone sees no images; pass a LLaVA, or an adapter that was trained with its projector"
        )
    for name in names:
        if name.startswith(TOWER) or name.endswith(NOT_NEEDED):
            continue
        tensor = trained[name].to(stored[name].dtype) if name in trained and name in stored else None
        tensor = (trained[name] if name in trained else stored[name]) if tensor is None else tensor
        if name in BY_TOKEN:
            tensor = grown(tensor, rows, like)
        yield stored_name(native_name(name)), tensor
    if expected == {""}:
        width = len(trained.get(f"{PROJECTOR}bias", stored.get(f"{PROJECTOR}bias")))
        yield "multi_modal_projector.linear_2.weight", torch.eye(width)
        yield "multi_modal_projector.linear_2.bias", torch.zeros(width)


def tower_tensors(stored: Mapping[str, Tensor], place: str | Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A CLIP tower's weights by the names of transformers' checkpoints.

    Args:
        stored: those of the tower, or of what holds one under names that begin with `prefix`.
        place: where they are from, for the message.

    Raises:
        MixLoraError: there are no weights of a CLIP's vision model.
    """
    own = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
    if any(inner.startswith(VISION) for inner in own):  # transformers 5 writes none
        own = {inner.removeprefix(VISION): name for inner, name in own.items() if inner.startswith(VISION)}
    wanted = {inner: name for inner, name in own.items() if inner.startswith(_IN_TOWER)}
    if not wanted:
        raise MixLoraError(f"{place} holds no weights of a CLIP vision tower; copy it again")
    for inner, name in wanted.items():
        if not inner.endswith(NOT_NEEDED):
            yield stored_name(f"model.vision_tower.{inner}"), stored[name]


def of_whole_model(
    tensors: Iterable[tuple[str, Tensor]], native: Any, place: str | Path
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and at their end whether they are all that the model of the configuration `native` has.

    Args:
        tensors: by the names of transformers' checkpoints.
        place: where they are from, for the message.

    Raises:
        MixLoraError: one is missing, which transformers would fill with random numbers, or has another shape.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(native)
    # Some versions call the tower's modules as its checkpoints do.
    wanted = {stored_name(name.replace(f".{VISION}", ".")): form.shape for name, form in model.state_dict().items()}
    if native.tie_word_embeddings:
        del wanted[stored_name(HEAD)]
    for name, tensor in tensors:
        if wanted.pop(name, tensor.shape) != tensor.shape:
            raise MixLoraError(f"{place}: {name} has the shape {list(tensor.shape)}, which its config.json has not")
        yield name, tensor
    if missing := [name for name in wanted if not name.endswith(NOT_NEEDED)]:
        raise MixLoraError(
            f"{place} lacks {missing[0]} ({len(missing)} tensors in all), as transformers calls it; is the download "
            "complete?"
        )
