"""The text of an answer as its tokens come: what is certain so far, up to a stop, without blanks around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding writes for a letter whose bytes are not all there."""


def byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of a tokenizer's tokens for single bytes, as sentencepiece names them; none where it has no such tokens."""
    found = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return frozenset(token for token in found if token is not None and token != tokenizer.unk_token_id)


class AnswerText:
    """One answer.

    Args:
        decode: text of token ids, all of the answer so far.
        stops: texts that end the answer and are not part of it.
        bytes_: ids of tokens that are single bytes: a run of them is one text, or none of it is (see [`byte_tokens`]).
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        bytes_: Collection[int] = (),
    ) -> None:
        self._decode, self._stops, self._bytes = decode, tuple(stops), bytes_
        self.tokens: list[int] = []
        self.stopped = False
        self._told = ""

    def add(self, token: int) -> str:
        """Take a token in; returns what it makes certain, perhaps nothing."""
        self.tokens.append(token)
        text = self._text()
        if not self.stopped and (token in self._bytes or text.endswith(UNFINISHED)):
            return ""
        return self._tell(text[: len(text) - self._begun_stop(text)].rstrip())

    def end(self) -> str:
        """No token follows; returns the rest."""
        return self._tell(self._text().rstrip())

    def _text(self) -> str:
        text = self._decode(self.tokens).lstrip()
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(found)
        return text[: min(found)] if found else text

    def _begun_stop(self, text: str) -> int:
        """Letters at the end that a stop may begin with."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _tell(self, text: str) -> str:
        if not text.startswith(self._told):  # what decoding has taken back is told as it was
            return ""
        new, self._told = text[len(self._told) :], text if len(text) > len(self._told) else self._told
        return new
