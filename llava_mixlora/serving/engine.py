"""What answers requests: an engine, in this process or elsewhere, and the pieces that an answer comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .chat import ChatRequest

Routes = dict[str, tuple[list[int], list[int]]]
"""By layer name the factors that it chose, of pool A and of pool B."""


@dataclass(frozen=True)
class Usage:
    """Tokens, those of images among the prompt's."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    The last one has a `finish` ("stop" or "length"), the `usage`, and the `routes` where these were asked for.
    """

    text: str = ""
    finish: str | None = None
    usage: Usage | None = None
    routes: Routes | None = None


class Engine(Protocol):
    """Answers requests, several at a time.

    `models`: by the name that requests say, what `/v1/models` tells of each beside its name.
    """

    models: Mapping[str, Mapping[str, Any]]

    def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """The answer in pieces; closing the iterator gives the request up.

        Raises:
            RequestError: the conversation does not fit the model, or the engine is not there (503).
        """

    async def start(self) -> None:
        """Get ready; returns when requests are answered."""

    async def close(self) -> None:
        """Stop, and leave nothing behind."""
