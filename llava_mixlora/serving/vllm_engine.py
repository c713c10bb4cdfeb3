"""vLLM as the engine: for each prompt its own LoRA, which is what the adapter is for that prompt, exactly.

What vLLM believes it serves is a plain LoRA for each request, so it is unmodified, and batches requests of different
routes. A question that follows others in a conversation has keys and values before it that were made under their
routes, which no one LoRA is; such a conversation is answered by the model in this process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from PIL import Image

from ..native.names import native_name
from .chat import ChatRequest, Message
from .engine import Engine, Piece, Usage
from .in_process import longest_answer
from .prompt_loras import PromptLora, Together, loras_of
from .prompts import Prompt, Prompts
from .request_error import RequestError
from .shelf import FLAG, Shelf

ANSWER = 600.0
"""Seconds without a token after which an answer is given up."""
IDLE = 2.0
"""Seconds after which a connection is not used again: vLLM closes those that were idle for five."""
ENDING = 5.0
"""Seconds that unloading may take at the end."""
PAUSES = (0.1, 0.5, 0.0)
"""Seconds after each time that an unload has failed."""


class Place(Protocol):
    """Where vLLM answers: a process of ours, or another's."""

    url: str
    key: str | None

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def check_is_there(self) -> None: ...


@dataclass(frozen=True)
class Elsewhere:
    """A vLLM that somebody else runs, with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."""

    url: str
    key: str | None = None

    async def start(self) -> None:
        """It has started, or will."""

    async def close(self) -> None:
        """It is not ours."""

    def check_is_there(self) -> None:
        """Asking will tell."""


@dataclass(frozen=True)
class Routed:
    """An adapter: how its model is asked in this process, and PEFT's name for it."""

    prompts: Prompts
    adapter: str


class VllmEngine:
    """See the module.

    Args:
        place: of vLLM.
        models: by name, what `/v1/models` tells.
        routed: by name, the adapters among them; the others are vLLM's own model.
        prompts: by name, how those models are asked that are in this process too.
        nothing: by name, LoRAs that change nothing, for the models below adapters where vLLM is on a CPU: there its
            0.32 gives a request without a LoRA one of those that are answered beside it
            (vllm/lora/ops/torch_ops/lora_ops.py takes the index -1, which says none, for the last).
        conversations: answers what has several questions, by the same names; None where nothing is routed.
        shelf: for LoRAs, which vLLM can read.
        at_a_time: prompts that are routed together.
        longest: tokens of an answer where the request says nothing.
    """

    def __init__(
        self,
        place: Place,
        models: Mapping[str, Mapping[str, Any]],
        routed: Mapping[str, Routed],
        prompts: Mapping[str, Prompts],
        nothing: Mapping[str, PromptLora],
        conversations: Engine | None,
        shelf: Shelf,
        at_a_time: int,
        longest: int,
    ) -> None:
        self.place, self.models, self.routed = place, models, dict(routed)
        self.nothing = dict(nothing)
        self.prompts, self.conversations, self.shelf, self.longest = dict(prompts), conversations, shelf, longest
        self._own: tuple[str, int | None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._makers: dict[str, Together[Prompt, PromptLora]] = {}
        for name, each in self.routed.items():
            self._makers[name] = Together(
                lambda asked, each=each: loras_of(each.prompts, each.adapter, asked), at_a_time
            )
        headers = {} if place.key is None else {"authorization": f"Bearer {place.key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_a_time, keepalive_expiry=IDLE)
        timeout = httpx.Timeout(ANSWER, connect=5)
        self._client = httpx.AsyncClient(base_url=place.url, headers=headers, limits=limits, timeout=timeout)

    async def start(self) -> None:
        """Begin; returns when vLLM answers, where it is ours."""
        for maker in self._makers.values():
            maker.start()
        if self.conversations is not None:
            await self.conversations.start()
        await self.place.start()

    async def close(self) -> None:
        """End, and leave no LoRA behind."""
        if self._running:
            await asyncio.wait(self._running, timeout=ENDING)
        await self._client.aclose()
        await self.place.close()
        if self.conversations is not None:
            await self.conversations.close()

    async def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """See [`Engine`]."""
        if request.questions > 1 and request.model in self.routed and self.conversations is not None:
            async with contextlib.aclosing(self.conversations.answer(request)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        self.place.check_is_there()
        own, context = await self._own_model()
        most, prompt, model, routes = request.max_tokens, None, own, None
        if request.model in self.prompts:
            prompts = self.prompts[request.model]
            prompt = await asyncio.to_thread(prompts.prompt, request.messages)
            bounds = [bound for bound in (context, prompts.context) if bound is not None]
            most = longest_answer(prompt, request.max_tokens, self.longest, min(bounds, default=None))
        async with contextlib.AsyncExitStack() as stack:
            if prompt is not None and request.model in self.routed:
                lora = await self._makers[request.model].one(prompt)
                routes = lora.routes if request.wants_routes else None
                model = await stack.enter_async_context(self._loaded(lora))
            elif request.model in self.nothing:
                model = await stack.enter_async_context(self._loaded(self.nothing[request.model]))
            async for piece in self._asked(request, model, most):
                yield Piece(piece.text, piece.finish, piece.usage, routes if piece.finish else None)

    async def _own_model(self) -> tuple[str, int | None]:
        """What vLLM calls the model below all LoRAs, and the tokens of its context."""
        if self._own is None:
            response = await self._call("GET", "/v1/models")
            try:
                own = next(each for each in response.json()["data"] if not each.get("parent"))
                self._own = own["id"], own.get("max_model_len")
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                raise RequestError(f"{self.place.url} is no vLLM: it tells of no model", status=502) from None
        return self._own

    @contextlib.asynccontextmanager
    async def _loaded(self, lora: PromptLora) -> AsyncIterator[str]:
        folder = self.shelf.new()
        loading = self._run(self._load(folder, lora))
        # Whoever goes away is let go at once, but what has begun is brought to its end, and undone.
        try:
            await asyncio.shield(loading)
            yield folder.name
        finally:
            await asyncio.shield(self._run(self._unload(folder, loading)))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._running.add(task)  # nothing else may hold it
        task.add_done_callback(self._running.discard)
        return task

    async def _load(self, folder: Path, lora: PromptLora) -> None:
        named = {native_name(name): pair for name, pair in lora.tensors.items()}
        try:
            await asyncio.to_thread(self.shelf.put, folder, named)
        except OSError as error:
            what = f"the prompt's LoRA could not be written to {folder.parent} ({error.strerror})"
            raise RequestError(f"{what}; {FLAG} names another place", status=503) from None
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})

    async def _unload(self, folder: Path, loading: asyncio.Task[None]) -> None:
        await asyncio.wait([loading])
        for pause in PAUSES:
            with contextlib.suppress(RequestError):
                # One that has died, or has not loaded it, knows no such LoRA.
                await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": folder.name}, (200, 404))
                break
            if loading.exception() is not None:
                break
            await asyncio.sleep(pause)
        await asyncio.to_thread(self.shelf.take_away, folder)

    async def _asked(self, request: ChatRequest, model: str, most: int | None) -> AsyncIterator[Piece]:
        prompts = self.prompts.get(request.model)
        body = {
            "model": model,
            "messages": await asyncio.to_thread(lambda: [_as_json(message, prompts) for message in request.messages]),
            "add_special_tokens": True,  # what a text begins with is not in the chat templates of export-hf
            "max_tokens": most,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "seed": request.sampling.seed,
            "stop": list(request.stop),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        told, held, finish, usage = False, "", "stop", None
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._own = None  # perhaps it is another by now
                    raise _refusal(response)
                async for line in response.aiter_lines():
                    content = _event(line)
                    if content is None:
                        continue
                    if content.get("usage"):
                        usage = Usage(content["usage"]["prompt_tokens"], content["usage"]["completion_tokens"])
                    for choice in content.get("choices", ()):
                        finish = choice.get("finish_reason") or finish
                        held += choice.get("delta", {}).get("content") or ""
                    held = held if told else held.lstrip()
                    certain = held.rstrip()
                    if certain:
                        yield Piece(certain)
                        told, held = True, held[len(certain) :]
        except httpx.HTTPError as error:
            raise _gone(error) from None
        yield Piece("", finish, usage)

    async def _call(self, method: str, path: str, body: Any = None, good: Sequence[int] = (200,)) -> httpx.Response:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise _gone(error) from None
        if response.status_code not in good:
            raise RequestError(f"the engine refuses {path} ({_words_of(response)})", status=502)
        return response


def _gone(error: httpx.HTTPError) -> RequestError:
    what = str(error) or type(error).__name__
    return RequestError(f"the engine does not answer ({what[:200]}); try again", status=503)


def _refusal(response: httpx.Response) -> RequestError:
    """What vLLM says of a request: of a bad one to whoever sent it."""
    words = _words_of(response)
    if response.status_code == 400:
        return RequestError(words, code="context_length_exceeded" if "context length" in words else None)
    if response.status_code == 404:  # the LoRA, or the model, was there before
        return RequestError(f"the engine has begun anew ({words}); try again", status=503)
    return RequestError(f"the engine refuses ({words})", status=502)


def _words_of(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        content = response.json()
        return " ".join(str((content.get("error") or content)["message"]).split())[:500]
    return f"status {response.status_code}"


def _event(line: str) -> dict[str, Any] | None:
    text = line.removeprefix("data: ")
    if text == line or text == "[DONE]":
        return None
    content = json.loads(text)
    if "error" in content:
        raise RequestError(f"the engine failed ({str(content['error'].get('message'))[:300]})", status=503)
    return content


def _as_json(message: Message, prompts: Prompts | None) -> dict[str, Any]:
    if not message.pictures:
        return {"role": message.role, "content": message.text}
    pictures = [picture if prompts is None else prompts.as_seen(picture) for picture in message.pictures]
    images = [{"type": "image_url", "image_url": {"url": _data(picture)}} for picture in pictures]
    return {"role": message.role, "content": [*images, {"type": "text", "text": message.text}]}


def _data(picture: Image.Image) -> str:
    """The very pixels, as vLLM takes them."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
