"""What the inputs of a model tell of the sequence that its layers see: padding, samples packed into a row, answers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import MixLoraError

IGNORE_INDEX = -100
"""Label of an unsupervised position (`llava.constants.IGNORE_INDEX`, and PyTorch's cross entropy)."""

CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
"""What tells flash attention where the samples of a packed row begin (transformers' `FlashAttentionKwargs`)."""


_PLACEHOLDER = re.compile(r"(image|video|audio|speech|img)_token_(id|index)")
_PICTURES = re.compile(r"(images|videos|pixel_values|image_embeds|image_features|input_features|input_audio).*")


def image_positions(
    model: nn.Module, inputs: dict[str, Any], shape: tuple[int, int]
) -> tuple[Tensor | None, str | None]:
    """Where the features of images (video, sound) stand in a sequence, bool [B, S], and why that is not known.

    A transformers configuration names the token ids that they replace (`image_token_id`, `video_token_id`, ...). None
    and None: there are none.
    """
    config = getattr(model, "config", None)
    placeholders = _placeholders(config)
    token_ids = inputs.get("input_ids")
    if isinstance(token_ids, Tensor) and tuple(token_ids.shape) == shape:
        if placeholders:
            return torch.isin(token_ids, torch.tensor(placeholders, device=token_ids.device)), None
        given = (name for name, value in inputs.items() if value is not None and _PICTURES.fullmatch(name))
        if (name := next(given, None)) is None:
            return None, None
        return None, f"{name} are given to {type(model).__name__}, whose configuration names no image token"
    sees = placeholders or any(
        getattr(config, name, None) for name in ("vision_config", "mm_vision_tower", "audio_config")
    )
    if not sees:
        return None, None
    # LLaVA's own classes make the embeddings themselves, and what they put where only the plugin's patches tell.
    of_llava = "; for LLaVA's own models call llava_mixlora.patches.apply() first" if _is_llava(config) else ""
    return None, f"{type(model).__name__} is given inputs_embeds without the token ids{of_llava}"


def _is_llava(config: Any) -> bool:
    return getattr(config, "mm_vision_tower", None) is not None


def _placeholders(config: Any) -> list[int]:
    names = vars(config) if config is not None else {}
    ids = [getattr(config, name) for name in names if _PLACEHOLDER.fullmatch(name)]
    return [each for each in ids if isinstance(each, int)]


def attended_positions(mask: Any, shape: tuple[int, int], cache: Any = None) -> Tensor | None:
    """What an `attention_mask` tells of padding, bool [B, S], False there; None where it tells nothing.

    `mask`: [B, S or more], one of queries and keys [B, S, keys] or [B, 1 or heads, S, keys], or a dictionary of those.
    """
    mask = _whole_mask(mask)
    length = shape[1]
    if mask is None:
        return None
    if mask.ndim == 2 and mask.shape[1] >= length:
        # With a cache the mask also covers the positions before this forward's own.
        return mask[:, mask.shape[1] - length :].bool()
    if mask.ndim == 4 and length > 1:
        return _not_padding(mask, cached_positions(cache), length)
    return None


def answered_positions(labels: Any, kept: Any, shape: tuple[int, int]) -> Tensor | None:
    """What `labels` tell of the answers, bool [B, S], True there; None where they are not those of the sequence.

    `kept`: the model's `logits_to_keep`, a number of positions at the end or their indices or a mask [S]. Trainers that
    leave out logits which no label needs (ms-swift's) cut the labels to as many, of which the j-th is what the logits
    before it predict: that of the position after the (j-1)-th that is kept.
    """
    if not isinstance(labels, Tensor):
        return None
    if tuple(labels.shape) == shape:
        return labels != IGNORE_INDEX
    places = _kept_positions(kept, shape[1])
    if places is None or tuple(labels.shape) != (shape[0], len(places)):
        return None
    answered = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    answered[:, places[:-1].to(labels.device) + 1] = labels[:, 1:] != IGNORE_INDEX
    return answered


def _kept_positions(kept: Any, length: int) -> Tensor | None:
    """`logits_to_keep` as rising indices; None where it keeps everything, or is something else."""
    if isinstance(kept, int) and not isinstance(kept, bool):
        return torch.arange(length - kept, length) if 0 < kept < length else None
    if not isinstance(kept, Tensor) or kept.ndim != 1:
        return None
    if kept.dtype == torch.bool:
        return kept.nonzero()[:, 0] if len(kept) == length else None
    in_order = bool((kept[1:] > kept[:-1]).all()) and bool((kept >= 0).all()) and bool((kept < length).all())
    return kept if in_order else None


def cached_positions(cache: Any) -> int:
    """How many positions a cache holds; 0 where there is none, or of a kind that cannot tell."""
    if isinstance(cache, Cache):
        return int(cache.get_seq_length())
    while isinstance(cache, tuple) and cache:  # transformers 4.37: keys [B, heads, positions, d] and values by layer
        cache = cache[0]
    return cache.shape[2] if isinstance(cache, Tensor) and cache.ndim == 4 else 0


def cached_instances(cache: Any) -> int | None:
    """How many instances a transformers cache holds; None where it cannot tell."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else next(iter(getattr(cache, "key_cache", ())), None)
    return len(keys) if isinstance(keys, Tensor) and keys.ndim == 4 else None


def sample_starts(inputs: dict[str, Any], shape: tuple[int, int], attended: Tensor | None) -> Tensor | None:
    """Where the samples of packed rows begin, bool [B, S]; None where nothing speaks of packing.

    Told by `position_ids` that start again, cumulative lengths, a mask that numbers its samples, or one of queries and
    keys that lets them attend to nothing before a position.

    Raises:
        MixLoraError: two of them contradict each other, or one is of another shape or no division into samples.
    """
    if shape[1] < 2:
        return None
    told = {
        "position_ids": _restarts(inputs.get("position_ids"), shape, attended),
        "attention_mask": _blocks(_whole_mask(inputs.get("attention_mask")), shape, attended),
        "seq_idx": _changes(inputs.get("seq_idx"), shape, attended),
        **{name: _ends(name, inputs.get(name), shape, attended) for name in CUMULATIVE_LENGTHS},
    }
    known = {name: starts for name, starts in told.items() if starts is not None}
    if not known:
        return None
    found = torch.stack([starts.any() for starts in known.values()]).tolist()
    known = {name: starts for (name, starts), any_found in zip(known.items(), found) if any_found}
    if not known:
        return None
    (first, starts), *others = known.items()
    for other, its_starts in others:
        if not torch.equal(starts, its_starts):
            raise MixLoraError(
                f"{first} and {other} divide a packed row differently, at {_places(starts)} and at "
                f"{_places(its_starts)}: samples are routed apart, so pass what agrees"
            )
    return starts


def _whole_mask(mask: Any) -> Tensor | None:
    if isinstance(mask, dict):  # by kind of attention, which differ in what is near, not in what is padding
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def _not_padding(mask: Tensor, begin: int, length: int) -> Tensor | None:
    """What a mask of queries and keys [B, 1 or heads, S, keys] tells of the queries, bool [B, S].

    transformers makes such masks for caches of a fixed length, `begin` being the key of the first query. They are true,
    or zero, where a query attends to a key. Padding does not attend to itself, or, since some attention kernels fail
    on a query without any key, to all keys, those that come after it too.
    """
    if mask.shape[2] != length or mask.shape[3] < begin + length:
        return None
    attends = _attends(mask)
    attended = attends[:, :, begin : begin + length].diagonal(dim1=1, dim2=2).clone()
    attended[:, :-1] &= ~attends[:, :-1].all(dim=-1)
    return attended


def _attends(mask: Tensor) -> Tensor:
    return mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0].bool()


def _restarts(position_ids: Any, shape: tuple[int, int], attended: Tensor | None) -> Tensor | None:
    if not isinstance(position_ids, Tensor) or position_ids.ndim not in (2, 3):
        return None
    # Of several (time, height and width of images) the first never falls within a sample.
    of_text = position_ids if position_ids.ndim == 2 else position_ids[0]
    if of_text.shape[1] != shape[1] or of_text.shape[0] not in (1, shape[0]):
        raise MixLoraError(
            f"position_ids of shape {tuple(position_ids.shape)} for a sequence of {shape[0]} x {shape[1]} positions: "
            "pass one for each position"
        )
    starts = torch.zeros(of_text.shape, dtype=torch.bool, device=of_text.device)
    starts[:, 1:] = of_text[:, 1:] < of_text[:, :-1]
    if position_ids.ndim == 2:
        at_zero = of_text == 0
        # Zeros in a row are padding, apart from the last of them where a sample goes on with one.
        goes_on = torch.cat([of_text[:, 1:] == 1, at_zero.new_zeros(len(of_text), 1)], dim=1)
        starts[:, 1:] |= at_zero[:, 1:] & (goes_on[:, 1:] | ~at_zero[:, :-1])
    return _among_attended(starts.expand(shape), attended)


def _changes(numbers: Any, shape: tuple[int, int], attended: Tensor | None) -> Tensor | None:
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        return None
    if tuple(numbers.shape) != shape:
        return None
    starts = torch.zeros(shape, dtype=torch.bool, device=numbers.device)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return _among_attended(starts, attended)


def _blocks(mask: Tensor | None, shape: tuple[int, int], attended: Tensor | None) -> Tensor | None:
    if mask is None or mask.ndim != 4:
        return _changes(mask, shape, attended)
    if mask.shape[0] not in (1, shape[0]) or mask.shape[2:] != (shape[1], shape[1]):
        return None
    attends = _attends(mask)
    starts = torch.zeros(attends.shape[:2], dtype=torch.bool, device=mask.device)
    starts[:, 1:] = ~attends.diagonal(offset=-1, dim1=1, dim2=2)
    starts = _among_attended(starts.expand(shape), attended)
    number = starts.cumsum(dim=1)
    across = attends & (number.unsqueeze(2) != number.unsqueeze(1))
    if attended is not None:
        across = across & attended.unsqueeze(2) & attended.unsqueeze(1)
    if across.any():
        row, query, key = across.nonzero()[0].tolist()
        raise MixLoraError(
            f"attention_mask: in row {row} position {query} does not attend to position {query - 1} but to {key}, so "
            "its samples cannot be told apart; mask whole samples, or pass position_ids that start again at each"
        )
    return starts


def _ends(name: str, lengths: Any, shape: tuple[int, int], attended: Tensor | None) -> Tensor | None:
    if not isinstance(lengths, Tensor) or lengths.ndim != 1:
        return None
    ends = lengths.long()
    total = shape[0] * shape[1]
    if len(ends) < 2 or int(ends[0]) != 0 or int(ends[-1]) > total or bool((ends.diff() < 0).any()):
        raise MixLoraError(
            f"{name}={ends.tolist()}: expected lengths summed up from 0 to the {total} positions of the sequence"
        )
    starts = torch.zeros(total + 1, dtype=torch.bool, device=ends.device)
    starts[ends[1:]] = True
    starts = starts[:total].view(shape)
    if not starts[1:, 0].all():
        raise MixLoraError(
            f"{name}={ends.tolist()}: a sample goes on from one of the {shape[0]} rows of {shape[1]} positions into "
            "the next; expected lengths of what each row holds, padding included"
        )
    starts[:, 0] = False
    return _among_attended(starts, attended)


def _among_attended(starts: Tensor, attended: Tensor | None) -> Tensor:
    """Only starts of a sample behind another one: what stands behind padding begins its row."""
    if attended is None:
        return starts
    starts = starts & attended
    return starts & (attended.cumsum(dim=1) > 1)


def _places(starts: Tensor) -> str:
    return ", ".join(str(tuple(place)) for place in starts.nonzero()[:4].tolist())
