"""The page at `/`: a chat in a browser. Its files lie in `page/`, and nothing of it comes from elsewhere."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .request_error import RequestError
from .task_usage import TaskUsage

FILES = Path(__file__).with_name("page")
INDEX = "index.html"
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes(usage: TaskUsage, check: Callable[[Request], Any]) -> list[Route]:
    """What the server answers beside the API.

    Args:
        usage: of the training tasks.
        check: raises [`RequestError`] for who may not ask. The page itself is for everybody: it asks for the key.
    """
    files = {file.name: file.read_bytes() for file in sorted(FILES.iterdir()) if file.is_file()}

    async def index(_: Request) -> Response:
        return _answer(INDEX, files[INDEX])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise RequestError(f"{name[:100]}: the page has no such file", status=404)
        return _answer(name, files[name])

    async def tasks(request: Request) -> Response:
        check(request)
        return JSONResponse(await usage.of(request.query_params.get("model", "")))

    return [Route("/", index), Route("/page/tasks", tasks), Route("/page/{name}", file)]


def _answer(name: str, content: bytes) -> Response:
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return Response(content, media_type=kind, headers=HEADERS)
