"""vLLM's own server as a process that is begun, watched, begun again when it dies, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from ..errors import MixLoraError
from .keeper import end_group
from .request_error import RequestError
from .shelf import Keeper

SERVER = "vllm.entrypoints.openai.api_server"
START = 1800.0
"""Seconds that loading a model may take."""
BRIEF, MOST_BRIEF = 60.0, 3
"""An engine that dies within so many seconds, so often in a row, is not begun again."""
OF_THE_LOG = 12
"""Lines of its log that are told when it does not start."""


class VllmProcess:
    """See the module.

    Args:
        python: of the environment that has vLLM.
        flags: of its server, but for host and port.
        keeper: ends it when this process is gone.
        log: a file for what it says.
    """

    def __init__(self, python: str, flags: Sequence[str], keeper: Keeper, log: Path) -> None:
        self.python, self.flags, self.keeper, self.log = python, list(flags), keeper, log
        self.key = secrets.token_hex(16)  # it loads whatever it is told to, so nobody else on this machine may ask it
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.problem: str | None = "it has not started yet"
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; returns when it answers.

        Raises:
            MixLoraError: it ends before, or takes too long.
        """
        self._begin()
        if not await self._comes_up():
            self._end()
            self.keeper.say(f"drop {self.log.parent}")  # it is to be read
            last = " | ".join(self._last_lines())
            raise MixLoraError(f"vLLM did not start ({self.python} -m {SERVER}); its log {self.log} ends with: {last}")
        self._watch = asyncio.create_task(self._keep_alive())

    async def close(self) -> None:
        """End it."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await asyncio.to_thread(self._end)

    def check_is_there(self) -> None:
        """Refuse a request while it is not.

        Raises:
            RequestError: 503, with what is known.
        """
        if self.problem is None and self._process is not None and self._process.poll() is None:
            return
        raise RequestError(f"the engine is not there: {self.problem or 'it has just ended'}; try again", status=503)

    def _begin(self) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        command = [self.python, "-m", SERVER, "--host", host, "--port", port, *self.flags]
        told = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": self.key}
        told.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.keeper.say(f"keep-group {self._process.pid}")

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        ending = threading.Thread(target=end_group, args=(process.pid,))  # its workers too, which outlive it
        ending.start()
        process.wait()  # until it is waited for, it is one of the group
        ending.join()
        self.keeper.say(f"drop-group {process.pid}")
        self._process = None

    async def _comes_up(self) -> bool:
        until = time.monotonic() + START
        async with httpx.AsyncClient(timeout=5) as client:
            while self._process.poll() is None and time.monotonic() < until:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/health")).status_code == 200:
                        self.problem = None
                        return True
                await asyncio.sleep(0.2)
        return False

    async def _keep_alive(self) -> None:
        brief, began = 0, time.monotonic()
        while True:
            while self._process.poll() is None:
                await asyncio.sleep(0.2)
            self.problem = f"it ended with status {self._process.returncode}, and is starting again"
            await asyncio.to_thread(self._end)
            brief = brief + 1 if time.monotonic() - began < BRIEF else 0
            while brief < MOST_BRIEF:
                self._begin()
                if await self._comes_up():
                    break
                await asyncio.to_thread(self._end)
                brief += 1
            if brief >= MOST_BRIEF:
                break
            began = time.monotonic()
        self.problem = f"it does not start again; see {self.log}"

    def _last_lines(self) -> list[str]:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return [line.strip()[:200] for line in lines if line.strip()][-OF_THE_LOG:]
        return []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
