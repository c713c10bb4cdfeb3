"""One entry of a data file as a sample of LLaVA's form, or the reason why it cannot be one.

LLaVA's form is `{"image"?: file, "conversations": [{"from": "human" or "gpt", "value": text}, ...]}`, with `<image>`
once in a question where there is an image. Some forks take lists of images, with `<image>` as often. Understood as
well: `messages`, `role`/`content` with parts of text, `user` and `assistant`, lists of one image, images that are null
or empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MixLoraError
from ..llava_package import used
from .entries import entries

IMAGE = "<image>"
HUMAN, GPT = "human", "gpt"
ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT}
ELSEWHERE = ("images", "img", "image_path", "image_file", "image_url", "pictures", "video", "videos")
"""Fields in which other programs keep what LLaVA reads from `image`, or cannot read."""
LOOKS_LIKE_IMAGE = re.compile(r"</?\s*(image|img|picture|video)[\s_\-]*\w*\s*/?>", re.IGNORECASE)

CUT_OFF = "last question has no answer: cut off"
PUT_IN_FRONT = "no <image> in the text: put in front of the first question"
NO_IMAGE = "image is null or empty: taken for text alone"

Sample = dict[str, Any]


class Unusable(Exception):
    """An entry that cannot be trained on as it is.

    Args:
        reason: one of few, by which losses are counted.
        detail: what is wrong with this entry, and what to do; the reason when None.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or reason)
        self.reason = reason


def read_conversations(path: str | Path) -> list[Sample]:
    """All samples of a data file, in LLaVA's form.

    Raises:
        MixLoraError: as [`entries`], or the first entry that cannot be used, with its number from 0.
    """
    return [sample for sample, _ in _strict(path)]


def _strict(path: str | Path) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    for number, entry in enumerate(entries(path)):
        try:
            yield as_sample(entry)
        except Unusable as error:
            raise MixLoraError(f"{path}: entry {number}: {error}") from error


def as_sample(entry: Any) -> tuple[Sample, tuple[str, ...]]:
    """An entry in LLaVA's form, and what was repaired in it (of [`CUT_OFF`], [`PUT_IN_FRONT`], [`NO_IMAGE`]).

    The entry itself is returned where nothing has to be changed, and never changed.

    Raises:
        Unusable: it has no turns that LLaVA could train on, or its image and its text do not fit together.
    """
    if not isinstance(entry, dict):
        raise Unusable("not a conversation", f"expected an object with 'conversations', got {type(entry).__name__}")
    turns = _turns(entry)
    asked = turns[1:] if turns[0]["from"] == GPT else turns  # LLaVA leaves an answer out that nobody has asked for
    for position, turn in enumerate(asked):
        if turn["from"] != (HUMAN, GPT)[position % 2]:
            place = position + len(turns) - len(asked)
            raise Unusable(
                "turns do not alternate", f"turn {place} is again of {turn['from']!r}; expected human and gpt in turn"
            )
    repairs = []
    if asked and asked[-1]["from"] == HUMAN:
        asked, turns = asked[:-1], turns[:-1]
        repairs.append(CUT_OFF)
    if not asked:
        raise Unusable("no question with an answer", "expected a question and its answer at least")
    _check_not_empty(asked)
    image = _image(entry)
    if image is None and "image" in entry:
        repairs.append(NO_IMAGE)
        turns = [{**turn, "value": turn["value"].replace(IMAGE, "").strip()} for turn in turns]
        _check_not_empty(turns[len(turns) - len(asked) :])
    elif image is None:
        _check_text_alone(entry, turns)
    else:
        turns, was_put_in_front = _with_images(turns, asked, 1 if isinstance(image, str) else len(image))
        repairs += [PUT_IN_FRONT] * was_put_in_front
    if turns is entry.get("conversations") and image == entry.get("image"):
        return entry, ()
    sample = {name: value for name, value in entry.items() if name not in ("conversations", "messages", "image")}
    if image is not None:
        sample["image"] = image
    sample["conversations"] = turns
    return sample, tuple(repairs)


def _turns(entry: Sample) -> list[dict[str, Any]]:
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise Unusable(
            "no conversation",
            "has no usable 'conversations'; expected a list of at least two "
            '{"from": "human" or "gpt", "value": text}',
        )
    as_they_are = all(
        type(turn) is dict and turn.get("from") in (HUMAN, GPT) and type(turn.get("value")) is str for turn in turns
    )
    turns = turns if as_they_are else [_turn(turn, position) for position, turn in enumerate(turns)]
    for turn in turns:
        if not turn["value"].isascii() and any("\ud800" <= character <= "\udfff" for character in turn["value"]):
            raise Unusable("broken characters", "holds half of a character (a lone surrogate); write the whole one")
    return turns


def _turn(turn: Any, position: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable("no conversation", f"turn {position} is of type {type(turn).__name__}; expected an object")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role == "system":
        raise Unusable(
            "a system turn",
            f"turn {position} is of 'system'; LLaVA's templates have a text of their own there: leave it out, or make "
            "it part of the question",
        )
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Unusable(
            "unknown speaker", f"turn {position} is of {role!r}; expected human and gpt, or user and assistant"
        )
    if isinstance(text, list):
        text = "".join(_part(part, position) for part in text)
    if not isinstance(text, str):
        raise Unusable("text is not text", f"the text of turn {position} is {text!r:.40}; expected a string")
    return {"from": ROLES[role.lower()], "value": text}


def _part(part: Any, position: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return f"{IMAGE}\n"
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise Unusable("text is not text", f"turn {position} has a part {part!r:.40}; expected parts of text, and images")


def _check_not_empty(asked: list[dict[str, str]]) -> None:
    for turn in asked:
        if not turn["value"].strip():
            what = "an answer" if turn["from"] == GPT else "a question"
            raise Unusable(f"{what} is empty", f"{what} is empty; fill it in, or leave the turns out")


def images_of(sample: Sample) -> list[str]:
    """The names of a sample's images."""
    image = sample.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def _image(entry: Sample) -> str | list[str] | None:
    image = entry.get("image")
    if isinstance(image, list) and len(image) > 1:
        if used().takes_several_images:
            return [_name(each) for each in image]
        raise Unusable("several images", f"has {len(image)} images; this LLaVA trains on one image per sample")
    if isinstance(image, list):
        image = image[0] if image else None
    return None if image is None or image == "" or not _name(image).strip() else image


def _name(image: Any) -> str:
    if not isinstance(image, str):
        raise Unusable("image is no file name", f"its image is {image!r:.40}; expected the name of a file, or null")
    return image


def _check_text_alone(entry: Sample, turns: list[dict[str, str]]) -> None:
    for name in ELSEWHERE:
        if entry.get(name):
            raise Unusable(
                f"no 'image' but {name!r}", f"has {name!r}, which LLaVA does not read; expected the file in 'image'"
            )
    if any(IMAGE in turn["value"] for turn in turns):
        raise Unusable("<image> without an image", "its text has <image>, but it names no image; name it in 'image'")


def _with_images(
    turns: list[dict[str, str]], asked: list[dict[str, str]], images: int
) -> tuple[list[dict[str, str]], bool]:
    marks = [turn["value"].count(IMAGE) for turn in turns]
    total = sum(marks)
    if total > images:
        named = "one image" if images == 1 else f"{images} images"
        raise Unusable("more <image> than images", f"its text has {total} <image>, but it names {named}")
    if 0 < total < images:
        raise Unusable("fewer <image> than images", f"its text has {total} <image>, but it names {images} images")
    if any(mark and turn["from"] == GPT for mark, turn in zip(marks, turns)):
        raise Unusable("<image> in an answer", "has <image> in an answer; expected it in a question")
    if total:
        return turns, False
    if any(LOOKS_LIKE_IMAGE.search(turn["value"]) for turn in turns):
        found = next(match[0] for turn in turns if (match := LOOKS_LIKE_IMAGE.search(turn["value"])))
        raise Unusable("mark of the image is not <image>", f"its text has {found}; LLaVA reads {IMAGE} alone")
    first = len(turns) - len(asked)
    question = {**asked[0], "value": images * f"{IMAGE}\n" + asked[0]["value"]}
    return [*turns[:first], question, *turns[first + 1 :]], True
