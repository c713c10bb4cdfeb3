"""The engine in this process: upstream's own model, several prompts at a time.

A batch is whatever waits when the last one is done, or a moment later: clients that have got their answers ask again.
All questions of a batch are drawn alike, so greedy ones, which are most, go together; whichever adapter of a model they
are for, or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..method.forward_passes import known_prompt
from ..method.model import BASE_MODEL
from .answer_text import AnswerText
from .batched_generation import Row, generate
from .chat import ChatRequest, Sampling
from .engine import Piece, Routes, Usage
from .prompts import Prompt, Prompts, inputs_of
from .request_error import RequestError

MOMENT = 0.1
"""The share of the time that the last batch took for which the next one waits to become as large."""


@dataclass(frozen=True)
class Served:
    """One name that requests may say.

    `prompts`: of its model, which other names may have too. `adapter`: None for a model that has none; PEFT's name for
    the base where it is asked without its adapter.
    """

    prompts: Prompts
    adapter: str | None
    about: Mapping[str, Any]


@dataclass
class _Job:
    served: Served
    prompt: Prompt
    sampling: Sampling
    most: int
    stops: Sequence[str]
    wants_routes: bool
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | RequestError] = field(default_factory=asyncio.Queue)
    gone: threading.Event = field(default_factory=threading.Event)

    def tell(self, piece: Piece | RequestError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def goes_with(self, other: _Job) -> bool:
        drawn_alike = self.sampling == other.sampling and self.sampling.seed is None
        return self.served.prompts is other.served.prompts and drawn_alike


class InProcess:
    """See the module.

    Args:
        served: by name.
        batch_size: prompts at a time.
        longest: tokens of an answer where the request says nothing.
    """

    def __init__(self, served: Mapping[str, Served], batch_size: int = 8, longest: int = 1024) -> None:
        self.served, self.batch_size, self.longest = dict(served), batch_size, longest
        self.models = {name: each.about for name, each in served.items()}
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._asking, self._begins_by = 0, 0.0

    async def start(self) -> None:
        """Begin to answer."""
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Give up what is running, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """See [`Engine`]."""
        served = self.served[request.model]
        prompt = await asyncio.to_thread(served.prompts.prompt, request.messages)
        most = longest_answer(prompt, request.max_tokens, self.longest, served.prompts.context)
        loop = asyncio.get_running_loop()
        job = _Job(served, prompt, request.sampling, most, request.stop, request.wants_routes, loop)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, RequestError):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            job.gone.set()

    def _work(self) -> None:
        while batch := self._next_batch():
            began, self._asking = time.monotonic(), len(batch) + len(self._waiting)
            try:
                self._answer(batch)
            except Exception as error:
                what = str(error).splitlines()[0] if str(error) else type(error).__name__
                for job in batch:
                    job.tell(RequestError(f"the answer could not be generated ({what[:300]})", status=500))
            ended = time.monotonic()
            self._begins_by = ended + MOMENT * (ended - began)

    def _next_batch(self) -> list[_Job]:
        """Those that wait longest and go together; none when all is over."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.gone.is_set())
                left = self._begins_by - time.monotonic()
                if self._closed or (self._waiting and (left <= 0 or len(self._waiting) >= self._most_at_a_time())):
                    break
                self._changed.wait(left if self._waiting else None)
            if self._closed:
                return []
            first, batch, others = self._waiting.popleft(), [], deque()
            batch.append(first)
            while self._waiting:
                job = self._waiting.popleft()
                takes = len(batch) < self.batch_size and first.goes_with(job)
                (batch if takes else others).append(job)
            self._waiting = others
            return batch

    def _most_at_a_time(self) -> int:
        """As many as the next batch can be expected to have."""
        return min(self._asking, self.batch_size)

    def _answer(self, batch: list[_Job]) -> None:
        prompts, sampling = batch[0].served.prompts, batch[0].sampling
        inputs, answered = inputs_of(prompts.loaded, [job.prompt for job in batch])
        adapters = [job.served.adapter for job in batch]
        named = {} if adapters[0] is None else {"adapter_names": adapters}
        rows = [self._row(job, functools.partial(_routes_of, batch, number)) for number, job in enumerate(batch)]
        with _said(answered), _drawn_by(sampling.seed):
            generate(prompts.loaded[1], {**inputs, **named}, rows, prompts.ends, **_drawing(sampling, prompts))

    def _row(self, job: _Job, routes: Callable[[], Routes | None]) -> Row:
        tokenizer = job.served.prompts.loaded[0]
        text = AnswerText(
            lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), job.stops, job.served.prompts.bytes_
        )

        def tell(said: str, ended: str | None) -> None:
            if ended is None:
                job.tell(Piece(said))
            else:
                usage = Usage(job.prompt.length, len(text.tokens))
                job.tell(Piece(said, ended, usage, routes() if job.wants_routes else None))

        return Row(text, job.most, tell, gone=job.gone)


def _routes_of(batch: Sequence[_Job], number: int) -> Routes | None:
    """What the layers chose for one prompt of a batch that is being answered, and in a conversation for its last

    question; None for a model without a MixLoRA adapter.
    """
    job, model = batch[number], batch[number].served.prompts.loaded[1]
    tuner = getattr(model, "base_model", None)
    if job.served.adapter in (None, BASE_MODEL) or not hasattr(tuner, "routes"):
        return None
    found = {}
    last = list(itertools.accumulate(job.prompt.questions for job in batch))
    for name, route in tuner.routes(job.served.adapter).items():
        row = last[number] - 1 if len(route.index_A) == last[-1] else number
        found[name] = (route.index_A[row].tolist(), route.index_B[row].tolist())
    return found


def longest_answer(prompt: Prompt, asked: int | None, otherwise: int, context: int | None) -> int:
    """Tokens that an answer may have.

    Args:
        prompt: what is answered.
        asked: by the request; None where it says nothing.
        otherwise: of a request that says nothing, as far as they fit.
        context: tokens of a prompt and its answer; None where nothing bounds them.

    Raises:
        RequestError: they do not fit.
    """
    if context is None:
        return asked or otherwise
    left = context - prompt.length
    if left < (asked or 1):
        raise RequestError(
            f"the conversation takes {prompt.length} tokens and the answer up to {asked or 1}, more than the "
            f"{context} of the model's context; shorten it, or ask for fewer max_tokens",
            "messages",
            code="context_length_exceeded",
        )
    return asked or min(otherwise, left)


def _drawing(sampling: Sampling, prompts: Prompts) -> dict[str, Any]:
    padding = {"pad_token_id": prompts.loaded[0].pad_token_id or 0}
    if sampling.temperature == 0:
        return {**padding, "do_sample": False}
    return {**padding, "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


@contextlib.contextmanager
def _said(answered: torch.Tensor | None) -> Iterator[None]:
    """Let each question of a conversation be routed as in training."""
    if answered is None:
        yield
        return
    with known_prompt(answers=answered):
        yield


@contextlib.contextmanager
def _drawn_by(seed: int | None) -> Iterator[None]:
    if seed is not None:
        torch.manual_seed(seed)
    yield
