"""The stop words of upstream's programs."""

import pytest
from transformers import AutoTokenizer

from ..tiny import random_ids


@pytest.mark.parametrize("words, ends", [([""], False), (["", "red"], True), (["red"], True), (["blue"], False)])
def test_only_a_word_that_is_there_ends_an_answer(patched, tokenizer_folder, words, ends):
    from llava.mm_utils import KeywordsStoppingCriteria

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
    said = tokenizer("it is red", return_tensors="pt", add_special_tokens=False).input_ids
    criteria = KeywordsStoppingCriteria(words, tokenizer, random_ids(1, 0))
    assert criteria(said, None) is ends
