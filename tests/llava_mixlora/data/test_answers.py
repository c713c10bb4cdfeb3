"""Answers are told apart from the marks of a template that a fork teaches within the prompt, by small stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from llava_mixlora.data import answers
from llava_mixlora.data.answers import answer_mark, answers_alone

pytestmark = pytest.mark.one_stack
START, END, LINE = 1, 2, 3
WORDS = {"system": 4, "user": 5, "assistant": 6}


def ids_of(text, tokenizer):
    return tokenizer.get(text, [10 + ord(letter) - ord("a") for letter in text])


def with_marks(sources, tokenizer, has_image):
    """Teaches all of an answer's turn, and the marks of every other one."""
    ids, labels = [], []
    turns = [("system", "z"), *(({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in sources[0])]
    for role, text in turns:
        turn = [START, WORDS[role], LINE, *ids_of(text, tokenizer), END, LINE]
        ids += turn
        labels += turn if role == "assistant" else [each if each in (START, END) else -100 for each in turn]
    return {"input_ids": [ids], "labels": [labels]}


def answers_only(sources, tokenizer, has_image):
    """Teaches nothing but answers, as LLaVA itself does, with a token of the prompt that it takes along."""
    question, answer = (ids_of(turn["value"], tokenizer) for turn in sources[0])
    return {
        "input_ids": [[START, *question, LINE, *answer]],
        "labels": [[-100] * (len(question) + 1) + [LINE, *answer]],
    }


@pytest.fixture
def prepares(monkeypatch):
    def prepares(preprocess):
        parts = {"llava.constants": SimpleNamespace(IGNORE_INDEX=-100), "llava.train.train:preprocess": preprocess}
        monkeypatch.setattr(answers, "part", parts.__getitem__)

    return prepares


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_mark_is_what_stands_between_a_question_and_its_answer(prepares):
    prepares(with_marks)
    assert answer_mark({}).tolist() == [END, LINE, START, WORDS["assistant"], LINE]


def test_labels_of_answers_alone_need_no_mark(prepares):
    prepares(answers_only)
    assert answer_mark({}) is None


def test_no_mark_where_the_data_cannot_be_prepared(prepares):
    prepares(lambda *_, **__: 1 / 0)
    assert answer_mark({}) is None


def test_marks_within_the_prompt_are_no_answers_in_any_turn(prepares):
    prepares(with_marks)
    prepared = with_marks([turns("ab", "cd", "e", "fg")], {}, has_image=False)
    ids, labels = (torch.tensor(prepared[name]) for name in ("input_ids", "labels"))
    found = answers_alone(ids, labels, answer_mark({}))
    taught = [ids[0, n].item() for n in range(ids.shape[1]) if found[0, n] != -100]
    assert taught == [12, 13, END, LINE, START, 15, 16, END, LINE]  # up to the first gap
    asked = with_marks([turns("ab", "")], {}, has_image=False)["input_ids"][0][:-2]
    assert ids[0, : len(asked)].tolist() == asked
    assert (found[0] != -100).nonzero()[0].item() == len(asked)


def test_labels_stay_where_there_is_no_mark_and_rows_may_be_shorter_than_one():
    ids = labels = torch.tensor([[1, 2]])
    assert answers_alone(ids, labels, None) is labels
    assert answers_alone(ids, labels, torch.tensor([1, 2, 3])) is labels
