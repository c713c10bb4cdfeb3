"""A prompt that holds a conversation: which of its tokens the model has answered, so that they are routed as answers.

LLaVA's programs put a conversation into one text and hand its tokens to `generate`, where it looks like one question.
Training routes the last question of it by itself; [`routed_by_turns`] has a generation do the same.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..llava_package import part
from ..method.forward_passes import known_prompt


@dataclass(frozen=True)
class Marks:
    """By which text a template tells that the model answers (`opens`), has answered (`closes`), and is asked."""

    opens: str
    closes: str
    asks: str


def answers_of_prompt(prompt: str) -> list[tuple[int, int]]:
    """Where the model has answered in a prompt of one of LLaVA's templates: from the first character to the last mark.

    The template is the one that the prompt's last open answer is of, which is the one to be given now, or to be gone on
    with. Empty: nothing is answered yet, or the text is of no template.
    """
    opened = [marks for marks in _marks() if marks.opens in prompt]
    if not opened:
        return []
    marks = max(opened, key=lambda marks: prompt.rfind(marks.opens) + len(marks.opens))
    # An answer of no text leaves no mark of its end: the next question follows at once.
    answer = rf"{re.escape(marks.opens)}(?!{re.escape(marks.asks)})(.*?)({re.escape(marks.closes)}|\Z)"
    found = re.finditer(answer, prompt, flags=re.DOTALL)
    return [(match.start(1), match.end()) for match in found if match[1].strip() or match[2]]


def answered_tokens(prompt: str, tokenizer: Any) -> Tensor | None:
    """Which tokens of a prompt are answers, bool [1, T], as the labels of training tell; None where none are.

    T is as `tokenizer_image_token` tells, one for an image.
    """
    tokenizer_image_token = part("llava.mm_utils:tokenizer_image_token")
    answers = answers_of_prompt(prompt)
    if not answers:
        return None
    ids = tokenizer_image_token(prompt, tokenizer)

    def tokens_before(place: int) -> int:
        before = tokenizer_image_token(prompt[:place], tokenizer)
        return next((n for n, (one, other) in enumerate(zip(before, ids)) if one != other), len(before))

    def tokens_of_question(end: int) -> int:
        if not prompt.startswith(" ", end):
            return tokens_before(end)
        # Training takes one token off for the space, also where the tokenizer drops a space at the end.
        return len(tokenizer_image_token(prompt[: end + 1], tokenizer)) - 1

    answered = torch.zeros(1, len(ids), dtype=torch.bool)
    for begin, end in answers:
        answered[:, tokens_of_question(begin) : tokens_before(end)] = True
    return answered


class _LastPrompt(threading.local):
    text: str | None = None
    tokenizer: Any = None


_last = _LastPrompt()


def noting_prompts(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    """`tokenizer_image_token` that keeps in mind what it was given last in this thread, for [`routed_by_turns`]."""

    @functools.wraps(tokenize)
    def tokenizer_image_token(prompt: str, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        _last.text, _last.tokenizer = prompt, tokenizer
        return tokenize(prompt, tokenizer, *args, **kwargs)

    return tokenizer_image_token


def routed_by_turns(input_ids: Tensor) -> AbstractContextManager[None]:
    """For the generation from `input_ids` [1, T]: its question is routed as in training, after those answered before.

    They are the tokens of the prompt that this thread has tokenized last; those of any other are one question. The
    result may be entered in another thread.
    """
    if _last.text is None:
        return nullcontext()
    answered = answered_tokens(_last.text, _last.tokenizer)
    if answered is None or answered.shape != input_ids.shape:
        return nullcontext()
    return known_prompt(answers=answered)


def _marks() -> Iterator[Marks]:
    styles = part("llava.conversation:SeparatorStyle")
    for template in part("llava.conversation:conv_templates").values():
        asker, answerer = template.roles
        if template.sep_style in (styles.SINGLE, styles.TWO):
            closes = template.sep if template.sep_style == styles.SINGLE else template.sep2
            yield Marks(f"{template.sep}{answerer}:", closes, f"{asker}:")
        elif template.sep_style == styles.MPT:
            yield Marks(f"{template.sep}{answerer}", template.sep, asker)
        elif template.sep_style == styles.LLAMA_2:
            yield Marks("[/INST]", template.sep2, f"{template.sep}[INST]")
