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
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from PIL import Image

from ..native.names import native_name
from .chat import ChatRequest, Message
from .engine import Engine, Piece, Usage
from .prompt_loras import PromptLora, Together, loras_of
from .prompts import Prompt, Prompts
from .request_error import RequestError
from .shelf import Shelf

ANSWER = 600.0
"""Seconds without a token after which an answer is given up."""


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
        conversations: answers what has several questions, by the same names; None where nothing is routed.
        shelf: for LoRAs, which vLLM can read.
        at_a_time: prompts that are routed together.
        longest: tokens of an answer where the request says nothing.
        context: tokens of a prompt and its answer.
    """

    def __init__(
        self,
        place: Place,
        models: Mapping[str, Mapping[str, Any]],
        routed: Mapping[str, Routed],
        conversations: Engine | None,
        shelf: Shelf,
        at_a_time: int,
        longest: int,
    ) -> None:
        self.place, self.models, self.routed = place, models, dict(routed)
        self.conversations, self.shelf, self.longest = conversations, shelf, longest
        self.own_model = ""
        self._makers: dict[str, Together[Prompt, PromptLora]] = {}
        for name, each in self.routed.items():
            self._makers[name] = Together(
                lambda asked, each=each: loras_of(each.prompts, each.adapter, asked), at_a_time
            )
        headers = {} if place.key is None else {"authorization": f"Bearer {place.key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_a_time)
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
        async with contextlib.AsyncExitStack() as stack:
            model, routes = await self._own_model(), None
            if request.model in self.routed:
                routed = self.routed[request.model]
                prompt = await asyncio.to_thread(routed.prompts.prompt, request.messages)
                lora = await self._makers[request.model].one(prompt)
                routes = lora.routes if request.wants_routes else None
                model = await stack.enter_async_context(self._loaded(lora))
            async for piece in self._asked(request, model):
                yield Piece(piece.text, piece.finish, piece.usage, routes if piece.finish else None)

    async def _own_model(self) -> str:
        """What vLLM calls the model below all LoRAs."""
        if not self.own_model:
            listed = (await self._call("GET", "/v1/models")).json()["data"]
            self.own_model = next(each["id"] for each in listed if not each.get("parent"))
        return self.own_model

    @contextlib.asynccontextmanager
    async def _loaded(self, lora: PromptLora) -> AsyncIterator[str]:
        named = {native_name(name): pair for name, pair in lora.tensors.items()}
        folder: Path = await asyncio.to_thread(self.shelf.put, named)
        try:
            told = {"lora_name": folder.name, "lora_path": str(folder)}
            await self._call("POST", "/v1/load_lora_adapter", told)
            try:
                yield folder.name
            finally:
                # Also when the client is gone, which cancels whatever is awaited here.
                await asyncio.shield(asyncio.ensure_future(self._unload(folder.name)))
        finally:
            self.shelf.take_away(folder)

    async def _unload(self, name: str) -> None:
        with contextlib.suppress(RequestError):  # an engine that has died has unloaded all
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def _asked(self, request: ChatRequest, model: str) -> AsyncIterator[Piece]:
        body = {
            "model": model,
            "messages": await asyncio.to_thread(self._messages, request),
            "add_special_tokens": True,  # what a text begins with is not in the chat templates of export-hf
            "max_tokens": request.max_tokens or self.longest,
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

    def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        prompts = next((each.prompts for each in self.routed.values()), None)
        return [_as_json(message, prompts) for message in request.messages]

    async def _call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise _gone(error) from None
        if response.status_code != 200:
            raise _refusal(response)
        return response


def _gone(error: httpx.HTTPError) -> RequestError:
    what = str(error) or type(error).__name__
    return RequestError(f"the engine does not answer ({what[:200]}); try again", status=503)


def _refusal(response: httpx.Response) -> RequestError:
    """What vLLM says of a request, in its own words where they are for whoever sent it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = response.json()
        message = str((content.get("error") or content)["message"])
        if response.status_code == 400:
            code = "context_length_exceeded" if "context length" in message else None
            return RequestError(" ".join(message.split())[:500], code=code)
        return RequestError(f"the engine refuses ({' '.join(message.split())[:300]})", status=502)
    return RequestError(f"the engine refuses (status {response.status_code})", status=502)


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
