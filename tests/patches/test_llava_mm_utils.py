"""The stop words of upstream's programs, and the pictures that they are given."""

from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from ..tiny import message_of, random_ids


@pytest.mark.parametrize("words, ends", [([""], False), (["", "red"], True), (["red"], True), (["blue"], False)])
def test_only_a_word_that_is_there_ends_an_answer(patched, tokenizer_folder, words, ends):
    from llava.mm_utils import KeywordsStoppingCriteria

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
    said = tokenizer("it is red", return_tensors="pt", add_special_tokens=False).input_ids
    criteria = KeywordsStoppingCriteria(words, tokenizer, random_ids(1, 0))
    assert criteria(said, None) is ends


@pytest.mark.parametrize("aspect_ratio, size", [(None, (1, 5000)), ("pad", (1, 201)), ("pad", (20_000, 101))])
def test_picture_that_would_fill_the_memory_is_refused(patched, clip_folder, aspect_ratio, size):
    from llava.mm_utils import process_images

    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio)
    pictures = [Image.new("RGB", (8, 4)), Image.new("1", size)]
    assert len(process_images(pictures[:1], processor, config)) == 1
    message = message_of(process_images, pictures, processor, config)
    assert f"an image of {size[0]} x {size[1]} pixels" in message and "--input-limit image_" in message
