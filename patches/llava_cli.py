"""`llava.serve.cli`: a chat that keeps its answers, and whose questions are routed as in training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_mixlora.data.chat_prompt import noting_prompts, routed_by_turns

from .patch import FAULT, METHOD, Patch

MODULE = "llava.serve.cli"


def _keep_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        tokenizer, model, *others = original(*args, **kwargs)
        model.generate = functools.partial(_prompt_and_answer, model.generate, tokenizer)
        return tokenizer, model, *others

    return load_pretrained_model


def _prompt_and_answer(generate: Callable[..., Tensor], tokenizer: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """The prompt's tokens and the answer's [1, T + N], of which the program takes what follows the prompt's T."""
    with routed_by_turns(inputs):
        answer = generate(inputs, **kwargs)
    stops = [word for criteria in kwargs.get("stopping_criteria", ()) for word in getattr(criteria, "keywords", ())]
    return torch.cat([inputs, _of_text(tokenizer, answer[0], stops).unsqueeze(0)], dim=1)


def _of_text(tokenizer: Any, answer: Tensor, stops: list[str]) -> Tensor:
    """The tokens of an answer [N] that tell its text: no special ones around it, nor a stop word at its end.

    The template puts those there itself.
    """

    def text(end: int) -> str:
        return tokenizer.decode(answer[:end], skip_special_tokens=True).rstrip()

    begin, end = 0, len(answer)
    whole = text(end)
    for stop in filter(None, stops):
        whole = whole.removesuffix(stop).rstrip()
    while end and text(end - 1).startswith(whole):
        end -= 1
    while begin < end and int(answer[begin]) in tokenizer.all_special_ids:  # transformers 4.37 begins with one
        begin += 1
    return answer[begin:end]


PATCHES = (
    Patch(
        f"{MODULE}:load_pretrained_model",
        kind=FAULT,
        why="upstream takes the answer from behind the prompt's tokens, which LLaVA's generate() no longer returns, so "
        "that a chat's history holds empty answers",
        replace=_keep_answers,
        program=True,
    ),
    Patch(
        f"{MODULE}:tokenizer_image_token",
        kind=METHOD,
        why="only the text of a prompt tells the answers in it, after which a chat's question is routed by itself",
        replace=noting_prompts,
        parameters=("prompt", "tokenizer"),
        program=True,
    ),
)
