"""What a caller says of a sequence, where labels do not show what is prompt: masks, checked and fitted to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MixLoraError


class KnownPrompt:
    """What a caller said of the sequence: masks bool [B, L], each may be None."""

    def __init__(self, prompt: Any, answers: Any) -> None:
        self.prompt, self.answers = _as_mask("prompt", prompt), _as_mask("answers", answers)
        if self.prompt is None and self.answers is None:
            raise MixLoraError("known_prompt() was told nothing: pass prompt=, answers= or both, bool [B, S]")
        if self.prompt is not None and not self.prompt.any(dim=1).all():
            row = int((~self.prompt.any(dim=1)).nonzero()[0])
            raise MixLoraError(f"prompt: row {row} has no position that is True; routers average at least one")
        if self.prompt is not None and self.answers is not None:
            if self.prompt.shape != self.answers.shape:
                raise MixLoraError(
                    f"prompt of shape {tuple(self.prompt.shape)} and answers of shape {tuple(self.answers.shape)}: "
                    "expected the same"
                )
            if (self.prompt & self.answers).any():
                place = tuple((self.prompt & self.answers).nonzero()[0].tolist())
                raise MixLoraError(f"prompt and answers are both True at {place}: a position is one of them")

    def fitted(self, shape: tuple[int, int], begin: int, generates: bool) -> tuple[Tensor | None, Tensor | None]:
        """The masks as [B, S] of a forward pass whose first position is `begin`."""
        return tuple(
            None if mask is None else self._fit(name, mask, shape, begin, generates)
            for name, mask in (("prompt", self.prompt), ("answers", self.answers))
        )

    def _fit(self, name: str, mask: Tensor, shape: tuple[int, int], begin: int, generates: bool) -> Tensor:
        (B, S), (rows, length) = shape, mask.shape
        fits = begin + S == length or (generates and begin + S > length)
        if not fits or B % rows or (rows != B and not generates):
            raise MixLoraError(
                f"known_prompt: {name} of shape {tuple(mask.shape)} for a sequence of {B} x {begin + S} positions: "
                "expected one value for each position"
            )
        mask = nn.functional.pad(mask, (0, begin + S - length))[:, begin:]
        return mask.repeat_interleave(B // rows, dim=0)  # generate() repeats each prompt for its beams


def _as_mask(name: str, mask: Any) -> Tensor | None:
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    holds_others = mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any())
    if mask.ndim != 2 or holds_others:
        raise MixLoraError(
            f"{name} of shape {tuple(mask.shape)} and type {mask.dtype}: expected a mask [B, S] of True and False"
        )
    return mask.bool()
