"""Requests for an answer in the form of OpenAI's chat completions, read and checked.

What is not understood is refused, never left out: an answer that ignores half of a request looks like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..limits import limits
from .pictures import read_picture
from .request_error import RequestError

MOST_STOPS, LONGEST_STOP = 4, 256
MOST_MESSAGES = 1024
IMAGE_MARK = "<image>"
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that say nothing of the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logprobs": (False, None),
    "top_logprobs": (None,),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "functions": ([], None),
    "function_call": ("none", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "audio": (None,),
    "reasoning_effort": (None,),
}
"""Fields that no engine here has a use for, and the values that ask for nothing."""


@dataclass(frozen=True)
class Bounds:
    """What a request may hold, beside `limits`.

    `images`: pictures in a conversation. `image_folder`: where `file:` names may lie; None: such names are refused.
    `padded`: whether pictures are padded to squares, whose pixels count then. `tokens`: the longest answer.
    """

    images: int = 4
    image_folder: Path | None = None
    padded: bool = False
    tokens: int = 4096


@dataclass(frozen=True)
class Message:
    """What one side says: `role` is system, user or assistant; its pictures come before its text."""

    role: str
    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedily where `temperature` is 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One conversation that the assistant is to continue.

    `max_tokens`: None where only the server and the model's context bound the answer. `wants_usage`: in a stream, too.
    `wants_routes`: which factors each layer chose is to be told beside the answer (an extension, `mixlora_routes`).
    """

    model: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stream: bool = False
    wants_usage: bool = False
    wants_routes: bool = False

    @property
    def questions(self) -> int:
        """How often the user speaks."""
        return sum(message.role == "user" for message in self.messages)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        RequestError: it is none, or nested deeper than [`limits`] say.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else f"not JSON ({error})"
        raise RequestError(f"the body is {_short(what)}; expected a JSON object") from None
    if not isinstance(content, dict):
        raise RequestError(f"the body is {_kind(content)}; expected a JSON object")
    if _is_deep(content, limits().json_depth):
        raise RequestError(f"the body is nested more than {limits().json_depth} deep")
    return content


def read_request(content: Mapping[str, Any], bounds: Bounds) -> ChatRequest:
    """Read a request, its pictures too.

    Raises:
        RequestError: a field is missing, unknown, or of another form than OpenAI's.
    """
    fields = _Fields(content)
    model = fields.take("model", str, required=True)
    messages = _messages(fields.take("messages", list, required=True), bounds)
    longest = fields.whole("max_completion_tokens", 1, bounds.tokens)
    longest = fields.whole("max_tokens", 1, bounds.tokens) if longest is None else longest
    fields.drop("max_tokens")
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2, 0.0),
        top_p=fields.number("top_p", 0, 1, 1.0),
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
    )
    if sampling.top_p == 0:
        raise RequestError("top_p: 0; expected a number above 0, and at most 1", "top_p")
    stream = fields.take("stream", bool) or False
    options = fields.take("stream_options", dict) or {}
    if options and not stream:
        raise RequestError("stream_options: only where stream is true", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options.{_short(min(unknown))}: no such option", "stream_options")
    if not isinstance(wants_usage := options.get("include_usage", False), bool):
        raise RequestError("stream_options.include_usage: expected true or false", "stream_options")
    request = ChatRequest(
        model=model,
        messages=messages,
        max_tokens=longest,
        sampling=sampling,
        stop=_stops(fields.take("stop", (str, list))),
        stream=stream,
        wants_usage=wants_usage,
        wants_routes=fields.take("mixlora_routes", bool) or False,
    )
    fields.check_rest()
    return request


class _Fields:
    """A request's fields; each is taken once, and what is left over is unknown."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.left = dict(content)

    def take(self, name: str, kinds: type | tuple[type, ...], required: bool = False) -> Any:
        value = self.left.pop(name, None)
        if value is None and not required:
            return None
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise RequestError(f"{name}: {_kind(value)}; expected {expected}", name)
        return value

    def drop(self, name: str) -> None:
        self.left.pop(name, None)

    def number(self, name: str, least: float, most: float, otherwise: float) -> float:
        value = self.left.pop(name, None)
        if value is None:
            return otherwise
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not least <= value <= most:
            raise RequestError(f"{name}: {_short(value)}; expected a number from {least} to {most}", name)
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise RequestError(f"{name}: {_short(value)}; expected a whole number from {least} to {most}", name)
        return value

    def check_rest(self) -> None:
        for name, value in self.left.items():
            if name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise RequestError(f"{_short(name)}: no such field", _short(name))
            if value not in NEUTRAL[name]:
                raise RequestError(f"{name}: {_short(value)} is not offered here; leave it out", name)


_KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


def _messages(content: list[Any], bounds: Bounds) -> tuple[Message, ...]:
    if not content:
        raise RequestError("messages: empty; expected at least one, of the user", "messages")
    if len(content) > MOST_MESSAGES:
        raise RequestError(f"messages: {len(content)} of them; expected at most {MOST_MESSAGES}", "messages")
    found: list[Message] = []
    letters = 0
    for number, message in enumerate(content):
        place = f"messages[{number}]"
        role = _role(message, place)
        text, names = _content(message.get("content"), role, place)
        letters += len(text)
        if letters > limits().prompt_letters:
            raise RequestError(f"messages: more than {limits().prompt_letters:,} letters", "messages")
        if sum(len(each.pictures) for each in found) + len(names) > bounds.images:
            raise RequestError(f"{place}: more than {bounds.images} images in the conversation", "messages")
        pictures = tuple(
            read_picture(name, f"{place}: the image", bounds.image_folder, bounds.padded) for name in names
        )
        found.append(Message(role, text, pictures))
    turns = found[1:] if found[0].role == "system" else found
    expected = ["user", "assistant"] * len(turns)
    if [message.role for message in turns] != expected[: len(turns)] or len(turns) % 2 == 0:
        said = ", ".join(message.role for message in found[:8])
        raise RequestError(
            f"messages: {said}{', ...' if len(found) > 8 else ''}; expected user and assistant in turn, the user first "
            "and last, and a system message before them if any",
            "messages",
        )
    return tuple(found)


def _role(message: Any, place: str) -> str:
    if not isinstance(message, dict):
        raise RequestError(f"{place}: {_kind(message)}; expected an object with role and content", "messages")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"{place}.role: {_short(role)}; expected system, user or assistant", "messages")
    others = {name for name, value in message.items() if value not in (None, [])} - {"role", "content", "name"}
    if others:
        raise RequestError(f"{place}.{_short(min(others))}: not offered here", "messages")
    return role


def _content(content: Any, role: str, place: str) -> tuple[str, list[str]]:
    """A message's text, and the names or contents of its pictures."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise RequestError(f"{place}.content: {_kind(content)}; expected a text, or a list of parts", "messages")
    texts, pictures = [], []
    for number, part in enumerate(parts):
        here = f"{place}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(text := part.get("text"), str):
            texts.append(text)
        elif kind == "image_url" and role == "user":
            pictures.append(_image_url(part.get("image_url"), here))
        else:
            allowed = "a text part" if role != "user" else "a part of type text or image_url"
            raise RequestError(f"{here}: {_short(kind if kind else _kind(part))}; expected {allowed}", "messages")
    text = "\n".join(texts)
    if IMAGE_MARK in text:
        raise RequestError(f"{place}: its text holds {IMAGE_MARK}; send images as parts of type image_url", "messages")
    if "\0" in text:
        raise RequestError(f"{place}: its text holds a NUL character", "messages")
    if role == "user" and not text.strip() and not pictures:
        raise RequestError(f"{place}: it says nothing; expected a text or an image", "messages")
    return text, pictures


def _image_url(content: Any, place: str) -> str:
    url = content.get("url") if isinstance(content, dict) else content
    if not isinstance(url, str):
        raise RequestError(f"{place}.image_url: {_kind(content)}; expected an object with a url", "messages")
    return url


def _stops(content: str | list[Any] | None) -> tuple[str, ...]:
    stops = [content] if isinstance(content, str) else content or []
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise RequestError(
            f"stop: {_short(content)}; expected a text of 1 to {LONGEST_STOP} letters, or a list of up to {MOST_STOPS}",
            "stop",
        )
    return tuple(stops)


def _is_deep(content: Any, most: int) -> bool:
    level = [content]
    for _ in range(most):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, (dict, list)) for each in level)


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    return _KINDS.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)


def _short(value: Any) -> str:
    """A value in a message: one line of printable letters, not too long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text[:80].encode("unicode_escape").decode() if not text[:80].isprintable() else text[:80]
    return f"{text}..." if len(str(value)) > 80 else text
