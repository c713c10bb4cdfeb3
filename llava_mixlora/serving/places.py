"""Places for requests: so many are answered at a time, so many wait, and the rest is told to come again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from .request_error import RequestError


class Places:
    """Requests in the order in which they come.

    Args:
        at_a_time: that have a place.
        waiting: that may wait for one.
    """

    def __init__(self, at_a_time: int, waiting: int) -> None:
        self.at_a_time, self.most_waiting = at_a_time, waiting
        self.taken = self.waiting = 0
        self._free = asyncio.Semaphore(at_a_time)

    def counts(self) -> dict[str, int]:
        """How many are being answered, and how many wait."""
        return {"answering": self.taken, "waiting": self.waiting}

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a place while the body runs.

        Raises:
            RequestError: too many wait (429).
        """
        if self._free.locked() and self.waiting >= self.most_waiting:
            raise RequestError(
                f"{self.taken} requests are being answered and {self.waiting} wait; try again later", status=429
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._free.release()
