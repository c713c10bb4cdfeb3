"""Code books: tasks that contradict each other about the same pictures of digits, in LLaVA's JSON format.

Each book is a task: it maps the ten digits to the ten number words by a permutation of its own, and a key word in the
question names it. "what is the teal word for this digit?" may ask for "six" where the picture shows a 3, and the same
question with "odd" for "nine". An adapter that does not tell the books apart can at best give the answer that most of
them agree on: 20 to 30% of eight books. Questions come in one wording, or in six that all books share, so that only the
key word tells them apart; three further wordings are for asking only.

Pictures are those of `playground.data.tasks`, whose folder holds `images.json`. Every word is one token of the base
model's own tokenizer (`playground.base.tiny_tokenizer`) and was seen when the base model was trained.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from playground.data.tasks import WORDS

KEYS = (
    *("teal", "circle", "odd", "above", "letter", "light", "first", "corners"),
    *("black", "blue", "brown", "gray", "green", "red", "yellow", "rectangle"),
    *("triangle", "shape", "color", "background", "true", "parts", "even", "greater"),
    *("present", "handwritten", "after", "start", "other", "contain", "have", "look"),
)
"""The books' names. None occurs in a wording or an answer."""
WORDINGS = (
    "what is the {key} word for this digit?",
    "spell the number in the image, {key}.",
    "tell me the {key} number of this picture.",
    "how does the {key} list spell this digit?",
    "what does {key} show for the number in the image?",
    "check this picture with {key} and spell the number.",
)
"""Those to train on; the first one where there is only one."""
NEW_WORDINGS = (
    "spell this digit with the {key} list.",
    "in {key}, what is the number of this image?",
    "what {key} number does this picture show?",
)
"""Those that are only asked."""

Picture = dict[str, Any]
"""What `images.json` says of a picture: `image`, `split` and, of those here, `digit`."""


def code_books(count: int, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """The first `count` books by their key word: the word of each digit from 0 to 9.

    More books are the same ones and further ones. Two of them agree about one digit on the average.

    Raises:
        ValueError: there are not so many key words.
    """
    if not 1 <= count <= len(KEYS):
        raise ValueError(f"count={count}: expected 1 to {len(KEYS)} code books, one for each key word")
    return {key: tuple(random.Random(f"{seed} {key}").sample(WORDS, len(WORDS))) for key in KEYS[:count]}


def digit_pictures(data: Path, split: str) -> list[Picture]:
    """The pictures of digits of `split`, "train" or "heldout", in a folder that `playground.data.tasks` wrote."""
    pictures = json.loads((data / "images.json").read_text(encoding="utf-8"))
    return [picture for picture in pictures if picture["split"] == split and "digit" in picture]


def questions(
    pictures: Sequence[Picture],
    books: dict[str, tuple[str, ...]],
    wordings: Sequence[str],
    per_book: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A conversation for each book and picture, book after book; the book's key word is its `task`.

    Args:
        pictures: what to ask about.
        books: as [`code_books`] gives them.
        wordings: each question is in one of them, drawn at random.
        per_book: ask each book about so many pictures only, with each digit as often as the others (give or take one).
        seed: of what is drawn; the same questions for the same seed.

    Raises:
        ValueError: there are fewer than `per_book` pictures.
    """
    if per_book is not None and per_book > len(pictures):
        raise ValueError(f"per_book={per_book}: there are only {len(pictures)} pictures")
    made = []
    for key, words in books.items():
        draw = random.Random(f"{seed} {key}")
        chosen = pictures if per_book is None else _balanced(pictures, draw)[:per_book]
        for number, picture in enumerate(chosen):
            question = draw.choice(wordings).format(key=key)
            answer = words[picture["digit"]]
            made.append(_conversation(f"{key}-{number:04d}", key, picture["image"], question, answer))
    return made


def _balanced(pictures: Iterable[Picture], draw: random.Random) -> list[Picture]:
    """All pictures, one of each digit in turn as long as there are some."""
    by_digit: dict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_digit[picture["digit"]].append(picture)
    turns = [
        (turn, digit, picture)
        for digit, of_digit in by_digit.items()
        for turn, picture in enumerate(draw.sample(of_digit, len(of_digit)))
    ]
    return [picture for _, _, picture in sorted(turns, key=lambda found: found[:2])]


def _conversation(name: str, task: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "task": task, "conversations": turns}
