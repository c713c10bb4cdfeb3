"""The answers in a prompt that holds a conversation are those that the labels of training tell."""

import pytest
import torch
from transformers import AutoTokenizer

from llava_mixlora.data.chat_prompt import answered_tokens, answers_of_prompt, noting_prompts, routed_by_turns

TURNS = ("<image>\nwhat color is it?", "red and green", "what shape?", "a circle.\nIt is round", "sure?", "yes")


def read(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.unk_token, 2048
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(patched, tokenizer_folder):
    return read(tokenizer_folder)


@pytest.fixture(scope="module")
def exact_tokenizer(patched, exact_tokenizer_folder):
    return read(exact_tokenizer_folder)


def prompt_of(template, *turns):
    """The text of a conversation; of one that ends with a question, with the mark of the answer to be given."""
    from llava.conversation import conv_templates

    asked = conv_templates[template].copy()
    for place in range(len(turns) + len(turns) % 2):
        asked.append_message(asked.roles[place % 2], turns[place] if place < len(turns) else None)
    return asked.get_prompt()


def texts(prompt):
    return [prompt[begin:end] for begin, end in answers_of_prompt(prompt)]


@pytest.mark.parametrize("template", ["v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct"])
@pytest.mark.parametrize("read_by", ["tokenizer", "exact_tokenizer"])
def test_answered_tokens_are_those_that_training_supervises(patched, request, monkeypatch, template, read_by):
    from llava import conversation
    from llava.train import train

    tokenizer = request.getfixturevalue(read_by)
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates[template])
    source = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(TURNS)]
    supervised = train.preprocess([source], tokenizer, has_image=True)["labels"] != -100
    answered = answered_tokens(prompt_of(template, *TURNS), tokenizer)
    assert answered.any() and torch.equal(answered, supervised)
    asked = answered_tokens(prompt_of(template, *TURNS[:-1]), tokenizer)
    assert asked.sum() < answered.sum() and torch.equal(asked, answered[:, : asked.shape[1]] & _until(asked, answered))


def _until(asked, answered):
    """True up to the last answer of a prompt whose last question is open."""
    return torch.arange(asked.shape[1])[None] <= asked.nonzero()[-1, 1]


@pytest.mark.parametrize("template", ["llava_v0", "v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "mpt"])
def test_template_is_known_from_the_prompt(patched, template):
    found = texts(prompt_of(template, *TURNS[:-1]))
    answers = TURNS[1:4:2]
    assert all(text.lstrip().startswith(answer) for text, answer in zip(found, answers, strict=True))
    assert not any(question in text for text in found for question in TURNS[::2])


@pytest.mark.parametrize("template", ["llava_v0", "v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "plain"])
def test_single_question_has_no_answers(patched, tokenizer, template):
    prompt = prompt_of(template, TURNS[0])
    assert texts(prompt) == [] and answered_tokens(prompt, tokenizer) is None


@pytest.mark.parametrize("prompt", ["", "no template at all", "USER: <image>\nwhat? ", "</s>", "### Human: hello"])
def test_text_of_no_template_has_no_answers(patched, prompt):
    assert texts(prompt) == []


def test_answer_to_be_gone_on_with_is_an_answer(patched):
    assert texts("A chat. USER: why? ASSISTANT: Because it") == [" Because it"]


@pytest.mark.parametrize("template", ["llava_v0", "v1", "chatml_direct"])
def test_question_behind_an_empty_answer_is_no_answer(patched, template):
    prompt = prompt_of(template, "first?", "", "second?", "yes", "third?")
    assert [text.partition("yes")[0].strip() for text in texts(prompt)] == [""]


def test_name_of_the_answerer_in_a_question_of_another_template_is_text(patched):
    prompt = prompt_of("chatml_direct", "who says ASSISTANT: here?", "nobody", "and [/INST] there?")
    assert texts(prompt) == ["nobody<|im_end|>"]


def test_another_prompt_than_the_one_tokenized_last_is_one_question(tokenizer):
    from llava.mm_utils import tokenizer_image_token

    from llava_mixlora.method.forward_passes import known_answers

    prompt = prompt_of("v1", *TURNS[:-1])
    ids = noting_prompts(tokenizer_image_token)(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
    with routed_by_turns(ids):
        assert torch.equal(known_answers(), answered_tokens(prompt, tokenizer))
    with routed_by_turns(ids[:, 1:]):
        assert known_answers() is None
