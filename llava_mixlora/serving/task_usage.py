"""Which factors the training tasks use: what the page finds the task with that is nearest to an answer's routes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.drawing import drawn_evenly
from ..data.images import image_problem, open_image
from ..data.kept_calibration import kept_calibration
from ..errors import MixLoraError
from .chat import IMAGE_MARK, ChatRequest, Message
from .engine import Engine, Routes
from .places import Places
from .request_error import RequestError

OF_A_TASK = 8
"""Samples; their questions are asked for one token each, as anybody's, so they wait for a place like anybody's."""
SECONDS = 60.0
"""After which no further round of questions, one of each task, begins."""
MOST = 500_000
"""Shares that a browser is given: tasks times layers times pools times factors."""
NOTHING: dict[str, Any] = {"tasks": [], "usage": {}}


class TaskUsage:
    """Made when it is first asked for, of the samples that a run has kept beside its adapter.

    Args:
        engine: that answers.
        places: for its requests.
        adapters: folders by the name of the model.
    """

    def __init__(self, engine: Engine, places: Places, adapters: Mapping[str, Path]) -> None:
        self._engine, self._places, self._adapters = engine, places, adapters
        self._made: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def of(self, model: str) -> dict[str, Any]:
        """A model's `tasks`, and by layer name their `usage`, [tasks][1 or 2 pools][factors].

        That is the share of a task's samples whose prompts choose a factor. There are no tasks where fewer than two are
        known of which each has samples whose pictures are there, or where the model could not be asked in time.
        """
        if model not in self._adapters:
            return NOTHING
        if model not in self._made:
            self._made[model] = asyncio.create_task(self._make(model))
        return await asyncio.shield(self._made[model])  # others wait for it too

    async def close(self) -> None:
        """Give up what is being made."""
        for task in self._made.values():
            task.cancel()
        await asyncio.gather(*self._made.values(), return_exceptions=True)

    async def _make(self, model: str) -> dict[str, Any]:
        samples = await asyncio.to_thread(samples_of_tasks, self._adapters[model])
        seen: dict[str, list[Routes]] = {task: [] for task in samples}
        began = time.monotonic()
        for number in range(OF_A_TASK if len(samples) > 1 else 0):
            if time.monotonic() - began > SECONDS:
                break
            for task, of_task in samples.items():
                if number < len(of_task) and (routes := await self._routes(model, of_task[number])):
                    seen[task].append(routes)
        return usage_of({task: routes for task, routes in seen.items() if routes}, self._engine.models[model])

    async def _routes(self, model: str, sample: Mapping[str, Any]) -> Routes | None:
        """Those of a sample's first question; None where it is not answered."""
        try:
            messages = await asyncio.to_thread(_messages, sample)
            request = ChatRequest(model, messages, max_tokens=1, wants_routes=True)
            async with self._places.one():
                return [piece async for piece in self._engine.answer(request)][-1].routes
        except (MixLoraError, RequestError):
            return None


def samples_of_tasks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Up to `OF_A_TASK` kept samples of each task; `image` names a file that is there. None where none are kept."""
    try:
        kept = kept_calibration(folder)
    except MixLoraError:  # whoever merges is told
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in [] if kept is None else drawn_evenly(kept.samples, len(kept.samples)):
        of_task = found.setdefault(str(sample["task"]), []) if sample.get("task") is not None else None
        if of_task is None or len(of_task) == OF_A_TASK:
            continue
        if sample.get("image") is None:
            of_task.append(sample)
        elif kept.image_folder is not None:
            image = os.path.join(kept.image_folder, sample["image"])
            if image_problem(image) is None:
                of_task.append({**sample, "image": image})
    return {task: of_task for task, of_task in sorted(found.items()) if of_task}


def usage_of(seen: Mapping[str, Sequence[Routes]], about: Mapping[str, Any]) -> dict[str, Any]:
    """See [`TaskUsage.of`]; `about`: what `/v1/models` tells of the model."""
    factors = about["mixlora"]["num_factors"]
    pools = 1 if about["mixlora"]["pairing"] == "same" else 2
    first = next((routes for of_task in seen.values() for routes in of_task), {})
    if len(seen) < 2 or len(seen) * len(first) * pools * factors > MOST:
        return NOTHING

    def share(of_task: Sequence[Routes], layer: str, pool: int) -> list[float]:
        chosen = [routes[layer][pool] for routes in of_task]
        return [round(sum(factor in each for each in chosen) / len(chosen), 3) for factor in range(factors)]

    usage = {
        layer: [[share(of_task, layer, pool) for pool in range(pools)] for of_task in seen.values()] for layer in first
    }
    return {"tasks": list(seen), "usage": usage}


def _messages(sample: Mapping[str, Any]) -> tuple[Message, ...]:
    question = next(turn["value"] for turn in sample["conversations"] if turn["from"] == "human")
    pictures = (open_image(sample["image"]),) if sample.get("image") is not None else ()
    return (Message("user", question.replace(IMAGE_MARK, "").strip(), pictures),)
