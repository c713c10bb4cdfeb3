"""Several answers generated together, each heard of as it comes, and each ended by itself."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .answer_text import AnswerText

STOP, LENGTH, GONE = "stop", "length", "gone"
ENDS_EACH_ROW = "Tensor" in str(inspect.signature(StoppingCriteria.__call__).return_annotation)
"""Whether transformers ends each row by itself; older versions end all rows or none."""


@dataclass
class Row:
    """One answer of a batch.

    Args:
        text: its text so far.
        most: tokens that it may have.
        tell: is called with a text, and at the end with how it ended.
    """

    text: AnswerText
    most: int
    tell: Callable[[str, str | None], None]
    ended: str | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    def add(self, token: int, ends: Sequence[int]) -> None:
        """Take the next token of generation, which an ended row does not hear."""
        if self.ended is not None:
            return
        if self.gone.is_set():
            self.ended = GONE
            return
        if token in ends:
            return self._end(STOP)
        said = self.text.add(token)
        if said:
            self.tell(said, None)
        if self.text.stopped:
            self._end(STOP)
        elif len(self.text.tokens) >= self.most:
            self._end(LENGTH)

    def _end(self, how: str) -> None:
        self.ended = how
        self.tell(self.text.end(), how)


class _Listening(BaseStreamer):
    """Hears the tokens [B] of each step; the prompt comes first."""

    def __init__(self, rows: Sequence[Row], ends: Sequence[int]) -> None:
        self.rows, self.ends, self.has_begun = rows, ends, False

    def put(self, value: Tensor) -> None:
        if not self.has_begun:
            self.has_begun = True
            return
        for row, token in zip(self.rows, value.flatten().tolist()):
            row.add(token, self.ends)

    def end(self) -> None:
        """All is heard already."""


class _EndOfRows(StoppingCriteria):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        ended = [row.ended is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device) if ENDS_EACH_ROW else all(ended)


def generate(model: Any, inputs: dict[str, Any], rows: Sequence[Row], ends: Sequence[int], **drawing: Any) -> None:
    """Generate the answers of B prompts.

    Args:
        model: a LLaVA, adapted or not.
        inputs: what its `generate` takes of the prompts.
        rows: B of them.
        ends: ids of tokens that end an answer.
        drawing: how tokens are drawn, as `generate` takes it.
    """
    listening = _Listening(rows, ends)
    with torch.inference_mode():
        model.generate(
            inputs["input_ids"],
            **{name: value for name, value in inputs.items() if name != "input_ids"},
            **drawing,
            max_new_tokens=max(row.most for row in rows),
            streamer=listening,
            stopping_criteria=[_EndOfRows(rows)],
            use_cache=True,
        )
    for row in rows:
        if row.ended is None:
            row._end(LENGTH)
