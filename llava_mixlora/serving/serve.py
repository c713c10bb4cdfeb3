"""`llava-mixlora serve`: a server of models and their adapters, as OpenAI's clients ask it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.model_places import adapter_of
from ..errors import MixLoraError
from ..inference.model_flags import add_model_flags, choices_of
from ..inputs import expanded, positive
from .pictures import FOLDER_FLAG
from .served_models import NamedModel, load_served, named_models

KEY_VARIABLE = "LLAVA_MIXLORA_API_KEY"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")
NEEDED = ("starlette", "uvicorn")
KEEP_ALIVE = 60
"""Seconds for which an idle connection is kept: OpenAI's client keeps it for five, and would meet one that closes."""
IN_PROCESS, VLLM = "transformers", "vllm"


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Describe the command `serve` to its parser."""
    parser.description = (
        "Serve adapters, and the models below them, over OpenAI's interface: /v1/chat/completions with images and "
        "streaming, /v1/models. Every prompt is routed by itself, as in training."
    )
    parser.epilog = (
        "example: llava-mixlora serve output/llava-mixlora --port 8000, then "
        "openai.OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')"
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="an adapter or a whole model: a folder, or a hub name; NAME=MODEL gives it another name than its folder's",
    )
    parser.add_argument("--model-base", metavar="BASE", help="the adapters' base (default: the one that each names)")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="of the language model's weights")
    parser.add_argument("--version", help="conversation template (default: as in the training of each)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"that every request has to say; also as {KEY_VARIABLE} in the environment"
    )
    parser.add_argument("--no-auth", action="store_true", help="let anybody ask who reaches --host")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="requests that are answered at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=positive, default=64, help="requests that may wait; others get 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=1024, help="the longest answer that is given (default: %(default)s)"
    )
    parser.add_argument("--max-images", type=positive, default=4, help="in a conversation (default: %(default)s)")
    parser.add_argument("--max-body", type=positive, default=32, metavar="MB", help="of a request (default: 32)")
    parser.add_argument(FOLDER_FLAG, metavar="DIR", help="requests may name images in it as file:PATH (default: none)")
    parser.add_argument(
        "--engine",
        default=IN_PROCESS,
        metavar="ENGINE",
        help=f"{IN_PROCESS}: in this process (default); {VLLM}: starts vLLM's own server; http://HOST:PORT: a vLLM "
        "that runs, with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and can read --lora-folder",
    )
    parser.add_argument(
        "--engine-python",
        metavar="PYTHON",
        default=sys.executable,
        help="of the environment that vLLM is in (default: this one's)",
    )
    parser.add_argument(
        "--engine-model", metavar="DIR", help="what export-hf makes for vLLM, or has made (default: MODEL-hf)"
    )
    parser.add_argument(
        "--engine-flags",
        metavar="FLAGS",
        default="",
        help="further flags of vLLM's server in one text, such as '--tensor-parallel-size 2'",
    )
    parser.add_argument(
        "--lora-folder",
        metavar="DIR",
        help="where vLLM is given the LoRAs of prompts: one that all its machines have (default: memory, /dev/shm)",
    )
    add_model_flags(parser)
    parser.set_defaults(command=_serve)


def _serve(given: argparse.Namespace) -> None:
    _check_installed(NEEDED if given.engine == IN_PROCESS else (*NEEDED, "httpx"))
    key = given.api_key or os.environ.get(KEY_VARIABLE) or None
    _check_door(given.host, key, given.no_auth)
    folder = None if given.allowed_image_folder is None else expanded(given.allowed_image_folder)
    if folder is not None and not folder.is_dir():
        raise MixLoraError(f"{FOLDER_FLAG} {folder}: no such folder")
    models = named_models(given.models)
    listening = _listen(given.host, given.port)
    from .app import Door, app_of
    from .chat import Bounds

    with contextlib.ExitStack() as stack:
        engine, padded = _engine(models, given, stack)
        bounds = Bounds(given.max_images, folder, padded, given.max_tokens)
        door = Door(
            api_key=key,
            hosts=LOCAL_HOSTS if _is_loopback(given.host) else None,
            body_bytes=given.max_body << 20,
            at_a_time=given.batch_size,
            waiting=given.queue,
        )
        app = app_of(engine, bounds, door, _adapters(models, engine))
        _run(app, listening, f"{', '.join(engine.models)}", given.host)


def _engine(models: Sequence[NamedModel], given: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Any, bool]:
    """The engine, and whether its models pad pictures to squares."""
    choices = choices_of(given)
    if given.engine == IN_PROCESS:
        from .in_process import InProcess

        served = dict(load_served(models, given.model_base, given.bits, given.version, choices))
        padded = any(each.prompts.padded for each in served.values())
        return InProcess(served, given.batch_size, given.max_tokens), padded
    from .vllm_setup import EngineOptions, vllm_engine

    if given.engine != VLLM and not given.engine.startswith(("http://", "https://")):
        raise MixLoraError(f"--engine {given.engine}: expected {IN_PROCESS}, {VLLM} or http://HOST:PORT")
    if given.bits != 16:
        raise MixLoraError(f"--bits {given.bits}: vLLM quantizes by flags of its own (--engine-flags); leave it out")
    options = EngineOptions(
        url=None if given.engine == VLLM else given.engine.rstrip("/").removesuffix("/v1"),
        python=given.engine_python,
        folder=given.engine_model,
        lora_folder=given.lora_folder,
        flags=_flags(given.engine_flags),
        at_a_time=given.batch_size,
        longest=given.max_tokens,
        images=given.max_images,
    )
    return vllm_engine(models, given.model_base, given.version, choices, options, stack)


def _flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise MixLoraError(f"--engine-flags {text}: not the words of a command line ({error})") from None


def _run(app: Any, listening: socket.socket, names: str, host: str) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens when it answers."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = listening.getsockname()[1]
                place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                print(f"Serving {names} at {place}/v1 (a page to try them: {place}; Ctrl-C ends it)", flush=True)

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=KEEP_ALIVE)
    server = Server(config)
    server.run(sockets=[listening])
    if not server.started:  # what the engine has said of it stands in the log
        raise MixLoraError("the server did not start; see above")


def _check_installed(needed: Sequence[str]) -> None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MixLoraError(f"{' and '.join(missing)} is not installed; pip install 'llava-mixlora[serve]'")


def _check_door(host: str, key: str | None, no_auth: bool) -> None:
    if not _is_loopback(host) and key is None and not no_auth:
        raise MixLoraError(
            f"--host {host} lets others ask: say --api-key KEY (or {KEY_VARIABLE}), for requests to say, or --no-auth "
            "to let anybody"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything takes time."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With its protocol named asyncio sends at once; pieces of a stream would wait for clients to confirm others.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        raise MixLoraError(f"--host {host} --port {port}: cannot listen there ({error}); say another") from None
    return listening


def _adapters(models: Sequence[NamedModel], engine: Any) -> dict[str, Path]:
    """The folders of those that have routes."""
    routed = (each for each in models if "mixlora" in engine.models.get(each.name, {}))
    return {each.name: expanded(adapter_of(each.path)) for each in routed}
