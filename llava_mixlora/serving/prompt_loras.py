"""The LoRAs of prompts, made several at a time: one prefill for all that wait or, of routers on words, none."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..method.model import adapted_layers
from .engine import Routes
from .prompts import Prompt, Prompts, inputs_of
from .request_error import RequestError

Asked, Made = TypeVar("Asked"), TypeVar("Made")


@dataclass(frozen=True)
class PromptLora:
    """By layer name of upstream's model A' [r, d_in] and B' [d_out, r], and the factors that they are of."""

    tensors: dict[str, tuple[Tensor, Tensor]]
    routes: Routes


def loras_of(prompts: Prompts, adapter: str, asked: Sequence[Prompt]) -> list[PromptLora]:
    """What an adapter is for each of the prompts, each of one question."""
    model = prompts.loaded[1]
    tuner = model.base_model
    inputs, _ = inputs_of(prompts.loaded, asked)
    if model.peft_config[adapter].router_input == "words":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        routes = tuner.routes_of_words(**inputs, adapter_name=adapter)
        made = tuner.loras_of_prompts(adapter, **inputs)
    else:
        made = tuner.loras_of_prompts(adapter, **inputs, use_cache=False)
        routes = tuner.routes(adapter)
    return [
        PromptLora(
            lora, {name: (route.index_A[row].tolist(), route.index_B[row].tolist()) for name, route in routes.items()}
        )
        for row, lora in enumerate(made)
    ]


def lora_of_nothing(prompts: Prompts, adapter: str) -> PromptLora:
    """One that changes nothing, for the model below an adapter."""
    name, layer = next(iter(adapted_layers(prompts.loaded[1].base_model.model, adapter).items()))
    return PromptLora({name: (torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1))}, {})


class Together(Generic[Asked, Made]):
    """Does for all that wait what is cheaper done for several at a time, in a thread of its own.

    Args:
        make: from what is asked for, as many results.
        most: that are made at a time.
    """

    def __init__(self, make: Callable[[list[Asked]], list[Made]], most: int) -> None:
        self._make, self._most = make, most
        self._waiting: deque[tuple[Asked, asyncio.AbstractEventLoop, asyncio.Future[Made]]] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    async def one(self, asked: Asked) -> Made:
        """What is made of this one."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Made] = loop.create_future()
        with self._changed:
            self._waiting.append((asked, loop, future))
            self._changed.notify()
        return await future

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                number = min(self._most, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(number)]
            batch = [each for each in batch if not each[2].cancelled()]
            if not batch:
                continue
            try:
                with torch.no_grad():
                    results: Sequence[Any] = self._make([asked for asked, _, _ in batch])
            except Exception as error:
                what = str(error).splitlines()[0] if str(error) else type(error).__name__
                results = [RequestError(f"the prompt could not be routed ({what[:300]})", status=500)] * len(batch)
            for (_, loop, future), result in zip(batch, results):
                loop.call_soon_threadsafe(_settle, future, result)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.cancelled():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
