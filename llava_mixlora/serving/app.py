"""The interface over HTTP: OpenAI's paths, its answers in one piece or as a stream, its form of errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .chat import Bounds, ChatRequest, parse_body, read_request
from .engine import Engine, Piece
from .page import page_routes
from .places import Places
from .request_error import RequestError
from .task_usage import TaskUsage

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
ALIVE = 0.1
"""Seconds between two looks at whether a client that waits is still there."""

READ_AND_FORGOTTEN = 8
"""Times the largest body: what is read of one that is too large."""


@dataclass(frozen=True)
class Door:
    """Who may ask, and how much at a time.

    `api_key`: None where nobody has to say one. `hosts`: names that a browser may call the server by; None: any.
    `body_bytes`: of a request. `at_a_time`: requests that are answered, and `waiting`: that may wait, of all models.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    body_bytes: int = 32 << 20
    at_a_time: int = 8
    waiting: int = 64


def app_of(engine: Engine, bounds: Bounds, door: Door, adapters: Mapping[str, Path] | None = None) -> Starlette:
    """The program that a web server runs; it starts the engine and closes it.

    `adapters`: folders of MixLoRA adapters by the name of their model; the page tells their training tasks.
    """
    api = _Api(engine, bounds, door)
    usage = TaskUsage(engine, api.places, adapters or {})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await usage.close()
            await engine.close()

    routes = [
        Route(CHAT, api.chat, methods=["POST"]),
        Route(MODELS, api.models),
        Route(f"{MODELS}/{{name:path}}", api.model),
        Route(HEALTH, api.health),
        *page_routes(usage, api.check_key),
    ]
    handlers = {RequestError: _refused, 404: _no_such_path, 405: _no_such_method, 500: _failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    if door.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(door.hosts))
    return app


class _Api:
    def __init__(self, engine: Engine, bounds: Bounds, door: Door) -> None:
        self.engine, self.bounds, self.door = engine, bounds, door
        self.places = Places(door.at_a_time, door.waiting)
        self.began = int(time.time())

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", **self.places.counts()})

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.engine.models]})

    async def model(self, request: Request) -> Response:
        self.check_key(request)
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._about(name))

    async def chat(self, request: Request) -> Response:
        self.check_key(request)
        chat = await self._read(request)
        async with contextlib.AsyncExitStack() as stack:
            await self._while_there(request, stack.enter_async_context(self.places.one()))
            pieces = await stack.enter_async_context(contextlib.aclosing(self.engine.answer(chat)))
            if not chat.stream:
                return JSONResponse(await self._while_there(request, _whole(chat, pieces)))
            # What can be refused is refused with its status, before a stream begins.
            first = await self._while_there(request, anext(pieces))
            kept = stack.pop_all()
        return _Stream(_events(chat, first, pieces), kept)

    async def _read(self, request: Request) -> ChatRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"content-type: {kind[:60] or 'none'}; expected application/json", status=415)
        try:
            content = parse_body(await self._body(request))
        except ClientDisconnect:
            raise RequestError("the client went away", status=499) from None
        if isinstance(content.get("model"), str):
            self._check_model(content["model"])
        return await asyncio.to_thread(read_request, content, self.bounds)

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.door.body_bytes, [], 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif size > READ_AND_FORGOTTEN * most:
                break
        if size > most:  # said only now: clients read no answer before they have sent all
            raise RequestError(f"the body has more than {most:,} bytes", status=413)
        return b"".join(parts)

    def check_key(self, request: Request) -> None:
        if self.door.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.door.api_key.encode()):
            raise RequestError("no API key, or a wrong one; expected a header Authorization: Bearer KEY", status=401)

    def _check_model(self, name: str) -> None:
        if name not in self.engine.models:
            known = ", ".join(self.engine.models)
            raise RequestError(
                f"model: {name[:100]!r}; expected one of {known}", "model", status=404, code="model_not_found"
            )

    def _about(self, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self.began, "owned_by": "llava-mixlora"}
        return {**about, **self.engine.models[name]}

    async def _while_there(self, request: Request, work: Any) -> Any:
        """Wait for work, unless whoever asked goes away meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=ALIVE)
                if not task.done() and await request.is_disconnected():
                    raise RequestError("the client went away", status=499)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _whole(chat: ChatRequest, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
    text, last = "", Piece(finish="stop")
    async for last in pieces:
        text += last.text
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": last.finish,
        "logprobs": None,
    }
    return {**_head(chat, "chat.completion"), "choices": [choice], "usage": _usage(last), **_routes(chat, last)}


class _Stream(StreamingResponse):
    """Events, and what is held until they are sent or nobody listens any more."""

    def __init__(self, events: AsyncIterator[str], kept: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._kept = kept

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            await self.body_iterator.aclose()
            await self._kept.aclose()


async def _events(chat: ChatRequest, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    head = _head(chat, "chat.completion.chunk")

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **others: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        usage = {"usage": None} if chat.wants_usage else {}
        return _event({**head, "choices": [choice], **usage, **others})

    yield chunk({"role": "assistant", "content": ""})
    piece: Piece | None = first
    try:
        while piece is not None:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish is not None:
                yield chunk({}, piece.finish, **_routes(chat, piece))
                if chat.wants_usage:
                    yield _event({**head, "choices": [], "usage": _usage(piece)})
            piece = await anext(pieces, None)
    except RequestError as error:
        yield _event(error.as_json())
    yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(chat: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": chat.model}


def _usage(last: Piece) -> dict[str, int] | None:
    if last.usage is None:
        return None
    counted = {"prompt_tokens": last.usage.prompt, "completion_tokens": last.usage.answer}
    return {**counted, "total_tokens": sum(counted.values())}


def _routes(chat: ChatRequest, last: Piece) -> dict[str, Any]:
    return {"mixlora_routes": last.routes} if chat.wants_routes else {}


async def _refused(_: Request, error: RequestError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.as_json(), status_code=error.status, headers=headers)


async def _no_such_path(request: Request, _: Exception) -> Response:
    error = RequestError(f"{request.url.path[:100]}: no such path; expected {CHAT} or {MODELS}", status=404)
    return JSONResponse(error.as_json(), status_code=404)


async def _no_such_method(request: Request, _: Exception) -> Response:
    error = RequestError(f"{request.method} {request.url.path[:100]}: no such method here", status=405)
    return JSONResponse(error.as_json(), status_code=405)


async def _failed(_: Request, error: Exception) -> Response:
    answer = RequestError(f"the server failed ({type(error).__name__}); its log tells more", status=500)
    return JSONResponse(answer.as_json(), status_code=500)
