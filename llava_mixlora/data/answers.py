"""Where answers begin in the labels that a LLaVA makes: some forks teach the marks of a template in the prompt too.

LLaVA-NeXT's templates of Qwen and Llama 3 supervise `<|im_end|>` and the like wherever they stand, so what precedes the
first supervised label is not the prompt that a model is asked with. Routers have to see that prompt in training.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from ..llava_package import TRAIN, part

QUESTIONS, ANSWERS = ("a", "b"), ("c", "d")


def answer_mark(tokenizer: Any) -> Tensor | None:
    """The tokens between a question and its answer, int64 [K], where the labels also teach what precedes the question.

    Asked of the training program's own `preprocess`, with the template that is set there. None where the labels teach
    nothing before the answer's own turn, as in LLaVA itself, or where `preprocess` cannot be asked.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            (ids, labels), (asked, _), (answered, _) = (
                _prepared(question, answer, tokenizer)
                for question, answer in (
                    (QUESTIONS[0], ANSWERS[0]),
                    (QUESTIONS[1], ANSWERS[0]),
                    (QUESTIONS[0], ANSWERS[1]),
                )
            )
    except Exception:  # templates without questions, tokenizers that miss something: preparing the data says so
        return None
    ignored = part("llava.constants").IGNORE_INDEX
    question, answer = _first_difference(ids, asked), _first_difference(ids, answered)
    if not (labels[1:question] != ignored).any():  # nothing predicts the first, whatever its label says
        return None
    end = len(ids) - _first_difference(ids.flip(0), asked.flip(0))
    return ids[end:answer] if end < answer else None


def answers_alone(ids: Tensor, labels: Tensor, mark: Tensor | None, ignored: int = -100) -> Tensor:
    """Labels [B, T] of what follows a mark and is supervised without a gap; `ignored` elsewhere.

    Args:
        ids: int64 [B, T].
        labels: int64 [B, T].
        mark: as of [`answer_mark`]; None leaves the labels as they are.
    """
    if mark is None or ids.shape[1] <= len(mark):
        return labels
    taught, begins = labels != ignored, torch.zeros_like(labels, dtype=torch.bool)
    begins[:, len(mark) :] = (ids.unfold(1, len(mark), 1) == mark.to(ids.device)).all(dim=-1)[:, :-1]
    begun = (begins & taught).long().cumsum(dim=1)
    before = begun.masked_fill(taught, 0).cummax(dim=1).values  # how many had begun when the last gap ended
    return labels.masked_fill(~taught | (begun == before), ignored)


def _prepared(question: str, answer: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    prepared = part(f"{TRAIN}:preprocess")([turns], tokenizer, has_image=False)
    return tuple(torch.as_tensor(prepared[name][0]) for name in ("input_ids", "labels"))


def _first_difference(one: Tensor, other: Tensor) -> int:
    shared = min(len(one), len(other))
    different = (one[:shared] != other[:shared]).nonzero()
    return int(different[0]) if len(different) else shared
