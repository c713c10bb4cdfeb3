"""`llava.serve.model_worker`: a worker that goes on after requests that fail, take long, or lose their client.

And that routes the last question of a conversation as in training.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from llava_mixlora.data.chat_prompt import noting_prompts, routed_by_turns
from llava_mixlora.limits import how_to_raise, limits
from llava_mixlora.llava_package import part

from .patch import FAULT, METHOD, Patch

MODULE = "llava.serve.model_worker"
LAST_SECONDS = 5
"""For answers under way when the worker is told to end."""


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class AnswerStream:
    """Ends with the generation that feeds it, however that ends, and ends a generation that nobody listens to.

    Mixed into `transformers.TextIteratorStreamer`; [`_end_stream_with_thread`] reports a failure.
    """

    def __init__(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, timeout=None, **kwargs)
        self.failure: BaseException | None = None
        self.abandoned = False

    def put(self, value: Any) -> None:
        if self.abandoned:
            raise ClientGoneError
        super().put(value)

    def fail(self, failure: BaseException) -> None:
        """End the stream with `failure`, which its reader meets."""
        self.failure = failure
        self.text_queue.put(self.stop_signal)

    def __iter__(self) -> Iterator[str]:
        # A generator is closed with the loop that reads it, which the streamer itself, being fed, outlives.
        try:
            yield from iter(self.text_queue.get, self.stop_signal)
            if self.failure is not None:
                raise self.failure
        finally:
            self.abandoned = True


def _stream_without_time_limit(original: type) -> type:
    return type(original.__name__, (AnswerStream, original), {"__module__": original.__module__})


def _end_stream_with_thread(original: type) -> Callable[..., Any]:
    def Thread(target: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        routed = routed_by_turns(kwargs["inputs"])  # this thread, not the new one, has tokenized the prompt
        return original(target=functools.partial(_generate, target, routed), kwargs=kwargs, daemon=True)

    return Thread


def _generate(
    generate: Callable[..., Any], routed: AbstractContextManager[None], streamer: AnswerStream, **kwargs: Any
) -> None:
    try:
        with routed:
            generate(streamer=streamer, **kwargs)
    except ClientGoneError:
        pass
    except BaseException as failure:
        streamer.fail(failure)


def _see_what_the_model_sees(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_multimodal = self.image_processor is not None

    return __init__


def _check_request(original: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    @functools.wraps(original)
    def generate_stream(self: Any, params: Any) -> Iterator[bytes]:
        if (letters := len(params["prompt"])) > limits().prompt_letters:
            why = how_to_raise("prompt_letters")
            raise ValueError(f"a prompt of {letters:,} letters, more than {limits().prompt_letters:,} {why}")
        places = params["prompt"].count(part("llava.constants:DEFAULT_IMAGE_TOKEN"))
        if places and not (self.is_multimodal and params.get("images")):
            why = "the request has none" if self.is_multimodal else f"{self.model_name!r} sees none"
            raise ValueError(f"the prompt has places for {places} images, but {why}")
        yield from original(self, params)

    return generate_stream


def _release_in_the_event_loop(original: Callable[..., None]) -> Callable[..., Any]:
    # The framework runs plain functions in other threads, and awaits coroutines where the semaphore lives.
    @functools.wraps(original)
    async def release_model_semaphore(fn: Callable[[], None] | None = None) -> None:
        original(fn)

    return release_model_semaphore


def ends_when_told(module: str, heart_beat: str) -> tuple[Patch, Patch]:
    """Patches by which one of LLaVA's servers ends at Ctrl-C.

    Args:
        module: of the server.
        heart_beat: its function that a thread runs for ever.
    """
    return (
        Patch(
            f"{module}:{heart_beat}",
            kind=FAULT,
            why="its thread never ends, and Ctrl-C waits for it",
            replace=_in_the_background,
            program=True,
        ),
        Patch(
            f"{module}:uvicorn",
            kind=FAULT,
            why="Ctrl-C waits for every answer that is under way, and for clients that have stopped reading theirs",
            replace=_end_soon,
            program=True,
        ),
    )


def _end_soon(original: Any) -> Any:
    """Make of the name `uvicorn` in a server's module one that gives answers [`LAST_SECONDS`] when it has to end."""
    return SimpleNamespace(run=functools.partial(original.run, timeout_graceful_shutdown=LAST_SECONDS))


def _in_the_background(original: Callable[..., None]) -> Callable[..., None]:
    """Make of what a thread runs for ever something that does not keep the process alive."""

    @functools.wraps(original)
    def begin(*args: Any) -> None:
        threading.Thread(target=original, args=args, daemon=True).start()

    return begin


def _beat_aside(original: Callable[[Any], None]) -> Callable[[Any], None]:
    wanted, starting = threading.Event(), threading.Lock()
    beating: list[threading.Thread] = []

    def beat(worker: Any) -> None:
        while wanted.wait():
            wanted.clear()
            try:
                original(worker)
            except Exception as error:
                print(f"heart beat failed: {error!r}", flush=True)

    @functools.wraps(original)
    def send_heart_beat(self: Any) -> None:
        with starting:
            if not beating:
                beating.append(threading.Thread(target=beat, args=(self,), daemon=True))
                beating[0].start()
        wanted.set()

    return send_heart_beat


PATCHES = (
    Patch(
        f"{MODULE}:TextIteratorStreamer",
        kind=FAULT,
        why="upstream gives up an answer whose next token takes 15 seconds, as it may without a GPU, and goes on "
        "generating when the client is gone",
        replace=_stream_without_time_limit,
        program=True,
    ),
    Patch(
        f"{MODULE}:Thread",
        kind=FAULT,
        why="a generation that fails in its thread would leave its request, which cannot know, waiting",
        replace=_end_stream_with_thread,
        program=True,
    ),
    Patch(
        f"{MODULE}:tokenizer_image_token",
        kind=METHOD,
        why="only the text of a prompt tells the answers in it, after which a chat's question is routed by itself",
        replace=noting_prompts,
        parameters=("prompt", "tokenizer"),
        program=True,
    ),
    Patch(
        f"{MODULE}:ModelWorker.__init__",
        kind=FAULT,
        why="upstream takes no images for a model whose folder does not say 'llava'",
        replace=_see_what_the_model_sees,
        program=True,
    ),
    Patch(
        f"{MODULE}:ModelWorker.generate_stream",
        kind=FAULT,
        why="a prompt with <image> but no image would look up token -200, which on a GPU ends all later requests too, "
        "and one of 10 MB holds all others up for half a minute",
        replace=_check_request,
        parameters=("params",),
        program=True,
    ),
    Patch(
        f"{MODULE}:release_model_semaphore",
        kind=FAULT,
        why="upstream releases an asyncio.Semaphore from other threads, where neither count nor waiters are safe",
        replace=_release_in_the_event_loop,
        parameters=("fn",),
        program=True,
    ),
    Patch(
        f"{MODULE}:ModelWorker.send_heart_beat",
        kind=FAULT,
        why="every request tells the controller first, and while that does not answer the worker would answer nobody",
        replace=_beat_aside,
        program=True,
    ),
    *ends_when_told(MODULE, "heart_beat_worker"),
)
