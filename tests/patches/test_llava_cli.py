"""What the command line gets from generate(); the chat itself runs in the end-to-end tests."""

import pytest
import torch
from llava_mixlora.patches.llava_cli import PATCHES
from transformers import AutoTokenizer

PROMPT = torch.tensor([[1, -200, 7, 8]])


class Stop:
    def __init__(self, *keywords):
        self.keywords = keywords


class Model:
    """Answers with the tokens that it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def generate(self, inputs, **kwargs):
        return torch.tensor([self.answer])


@pytest.fixture
def kept(tokenizer_folder, patched):
    """The text that upstream's program puts into the history for the tokens of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)

    def kept(text, stop, *behind, before=()):
        ids = [*before, *tokenizer(text, add_special_tokens=False).input_ids, *behind]
        load = PATCHES[0].replace(lambda: (tokenizer, Model(ids), None, 2048))
        _, model, *_ = load()
        output = model.generate(PROMPT, stopping_criteria=[Stop(stop)])
        assert torch.equal(output[:, : PROMPT.shape[1]], PROMPT)
        return tokenizer.decode(output[0, PROMPT.shape[1] :]).strip()

    return kept


@pytest.mark.parametrize("before", [(), (1,)], ids=["", "with BOS"])
@pytest.mark.parametrize("text", ["red", "red and green.", "a circle, it is", "蓝色", "1. red 2. green"])
def test_answer_is_kept_without_what_the_template_puts_around_it(kept, text, before):
    assert kept(text, "</s>", 2, before=before) == text
    assert kept(text, "</s>", before=before) == text
    assert kept(text + "###", "###", before=before) == text
    assert kept(text + "\n###", "###", before=before) == text


def test_stop_word_within_an_answer_stays(kept):
    assert kept("red ### green", "###", 2) == "red ### green"


def test_empty_stop_word_cuts_nothing_off(kept):
    """That of the template mistral_instruct."""
    assert kept("red", "", 2) == "red"


def test_answer_of_no_text_is_empty(kept):
    assert kept("", "</s>", 2) == "" and kept("###", "###") == ""
