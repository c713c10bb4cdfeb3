"""Tokens are counted as LLaVA makes them, and what it learns nothing of says why."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llava_mixlora.data.conversations import Unusable
from llava_mixlora.data.token_counts import TokenCounter, expanded_places

TEXTS = st.text(alphabet="abc de?!.,\n蓝😀~</>", min_size=1, max_size=30).filter(str.strip)


@pytest.fixture(scope="module")
def counter(patched, tokenizer_folder):
    """Makes counters, of which the last one counts."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token

    def counter(version="v1", limit=256):
        tokenizer.model_max_length = limit
        return TokenCounter(tokenizer, version, image_tokens=4)

    return counter


def sample(*texts, image=True):
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {**({"image": "1.png"} if image else {}), "conversations": turns}


def test_features_of_images_move_what_stands_behind_them():
    is_image = torch.tensor([[False, True, False, False, True, False], [False] * 6])
    assert expanded_places(is_image, 4).tolist() == [[0, 1, 5, 6, 7, 11], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("texts", [("<image>\nwhat color", "red"), ("<image>\nwhat", "red", "and", "green blue")])
def test_tokens_are_those_that_reach_the_model(counter, patched, llava, texts, image):
    from llava.constants import IGNORE_INDEX
    from llava.train import train

    texts = texts if image else [text.replace("<image>\n", "") for text in texts]
    count = counter().count(sample(*texts, image=image))
    with counter()._template():
        prepared = train.preprocess([sample(*texts)["conversations"]], counter().tokenizer, has_image=image)
    ids, labels = (torch.as_tensor(prepared[name][0])[None] for name in ("input_ids", "labels"))
    images = torch.zeros(1, 3, 16, 16)
    _, _, mask, _, embeddings, labels = llava.prepare_inputs_labels_for_multimodal(
        ids, None, torch.ones_like(ids, dtype=torch.bool), None, labels, images
    )
    assert count.tokens == embeddings.shape[1]
    assert count.supervised == int((labels != IGNORE_INDEX).sum()) > 0


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.booleans(), st.integers(60, 200))
def test_what_surely_fits_fits_and_teaches(counter, turns, image, limit):
    texts = [text for turn in turns for text in turn]
    one = sample(*(texts if not image else [f"<image>\n{texts[0]}", *texts[1:]]), image=image)
    of_limit = counter(limit=limit)
    if of_limit.surely_fits(one):
        assert of_limit.count(one).tokens <= limit


def test_ordinary_samples_surely_fit(counter):
    assert counter(limit=2048).surely_fits(sample("<image>\nwhat color is the shape?", "blue, as the sky is."))
    assert not counter(limit=100).surely_fits(sample("<image>\nwhat color is the shape?", "blue " * 100))


@pytest.mark.parametrize("image", [True, False])
def test_cut_samples_teach_what_is_left(counter, image):
    question = "<image>\nwhat" if image else "what"
    of_limit = counter()
    whole = of_limit.count(sample(question, "red " * 10, image=image))
    cut = counter(limit=whole.tokens - 7).count(sample(question, "red " * 10, image=image))
    assert cut.tokens == whole.tokens and cut.supervised == whole.supervised - 7


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("texts", [("what " * 200, "red"), ("what " * 300, "red", "and", "blue")])
def test_samples_that_are_cut_before_their_answers_say_so(counter, texts, image):
    first = f"<image>\n{texts[0]}" if image else texts[0]
    with pytest.raises(Unusable, match="--model_max_length 256 leaves none to learn") as error:
        counter().count(sample(first, *texts[1:], image=image))
    assert error.value.reason == "cut off before its answer"


@pytest.mark.parametrize("mark", ["</s>", " ASSISTANT: ", "<unk>"])
@pytest.mark.parametrize("where", [0, 1])
def test_marks_of_the_template_in_a_text_are_told(counter, mark, where):
    texts = ["<image>\nwhat color", "red green"]
    texts[where] += f"{mark}blue"
    assert not counter().surely_fits(sample(*texts))
    with pytest.raises(Unusable) as error:
        counter().count(sample(*texts))
    assert error.value.reason == "a mark of the template in the text" and repr(mark.strip())[1:-1] in str(error.value)


def test_what_the_template_does_not_stumble_over_is_counted(counter):
    assert counter("llava_llama_2").count(sample("<image>\nwhat", "red ASSISTANT: blue")).supervised
    assert counter("plain").count(sample("<image>", "a red circle")).supervised


def test_the_template_is_put_back(counter):
    from llava import conversation

    before = conversation.default_conversation
    counter("plain").count(sample("<image>", "a red circle"))
    assert conversation.default_conversation is before


def test_a_tokenizer_without_bytes_makes_unknown_characters_count(counter):
    of_limit = counter(limit=2048)
    assert of_limit.surely_fits(sample("<image>\nwhat", "蓝"))
    of_limit.__dict__["_has_unknown"] = True
    assert not of_limit.surely_fits(sample("<image>\nwhat", "蓝"))


@pytest.mark.parametrize("kept", ["v1", "plain"])
def test_templates_of_a_fork_that_has_no_vicuna_are_enough(counter, patched, monkeypatch, kept):
    from llava import conversation

    before = conversation.default_conversation
    monkeypatch.setattr(conversation, "conv_templates", {kept: conversation.conv_templates[kept]})
    with counter("v1")._template():
        assert conversation.default_conversation is (conversation.conv_templates[kept] if kept == "v1" else before)
    assert conversation.default_conversation is before
