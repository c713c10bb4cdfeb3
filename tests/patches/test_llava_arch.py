"""The routing scope inside upstream's LLaVA: the sequence that counts is the one with the image features."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from llava_mixlora import known_prompt

from ..tiny import layers, message_of, paper_form, random_ids, randomise

IMAGE, IGNORE = -200, -100
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
INSTRUCTION = {"pairing": "same", "router_scope": "instruction"}
WORDS = {**INSTRUCTION, "router_input": "words"}
each_form = pytest.mark.parametrize("form", [{}, INSTRUCTION, WORDS], ids=["default", "instruction", "words"])


def adapt(model, **options):
    target_modules = r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config = paper_form(r=2, num_factors=6, lora_alpha=8, target_modules=target_modules, **options)
    config.exclude_modules = r".*vision_tower.*"
    config.task_type = "CAUSAL_LM"
    model = randomise(get_peft_model(model, config)).eval()
    assert len(layers(model)) == 14
    return model


def prompt(before, after, seed):
    return torch.cat([random_ids(before, seed=seed), torch.tensor([IMAGE]), random_ids(after, seed=seed + 50)])


@pytest.fixture
def instances():
    """Prompts of different lengths, each with an image."""
    images = torch.randn(3, 3, 16, 16)
    return [prompt(2, 3, 1), prompt(1, 7, 2), prompt(3, 4, 3)], images


def right_padded(rows, value=0):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@pytest.mark.parametrize("form", [{}, {"router_scope": "sequence"}, INSTRUCTION, WORDS])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_of_different_prompts_gives_each_what_it_gets_alone(llava, instances, form, side):
    rows, images = instances
    llava.config.tokenizer_padding_side = side
    model = adapt(llava, **form)
    ids = right_padded(rows)
    together = model(input_ids=ids, attention_mask=right_padded([torch.ones_like(row) for row in rows]), images=images)
    longest = together.logits.shape[1]
    assert longest == max(len(row) for row in rows) + 3  # one image token has become four patches
    for b, row in enumerate(rows):
        alone = model(input_ids=row[None], images=images[b : b + 1]).logits[0]
        start = longest - len(alone) if side == "left" else 0
        torch.testing.assert_close(together.logits[b, start : start + len(alone)], alone, **CLOSE)


@each_form
def test_answers_and_their_padding_reach_no_router(llava, instances, form):
    rows, images = instances
    model = adapt(llava, **form)

    def routes_with(answers):
        full = [torch.cat([row, answer]) for row, answer in zip(rows, answers)]
        labels = [torch.cat([torch.full_like(row, IGNORE), answer]) for row, answer in zip(rows, answers)]
        model(
            input_ids=right_padded(full),
            labels=right_padded(labels, IGNORE),
            attention_mask=right_padded([torch.ones_like(row) for row in full]),
            images=images,
        )
        return torch.stack([route.score_A for route in model.base_model.routes().values()])

    short = routes_with([random_ids(1, seed=b) for b in range(3)])
    long = routes_with([random_ids(2 + b, seed=b + 20) for b in range(3)])
    torch.testing.assert_close(short, long, **CLOSE)
    for b, row in enumerate(rows):
        model(input_ids=row[None], images=images[b : b + 1])
        alone = torch.stack([route.score_A for route in model.base_model.routes().values()])
        torch.testing.assert_close(short[:, b : b + 1], alone, **CLOSE)


def test_image_reaches_the_routers(llava, instances):
    rows, images = instances
    model = adapt(llava)
    model(input_ids=rows[0][None], images=images[:1])
    first = model.base_model.routes()
    model(input_ids=rows[0][None], images=images[1:2])
    second = model.base_model.routes()
    assert any(not torch.allclose(first[name].score_A, second[name].score_A, atol=1e-4) for name in first)


def test_image_reaches_no_router_of_an_instruction(llava, instances):
    """Of words in no layer; of hidden states not before attention has mixed the positions."""
    rows, images = instances
    for form, layers_without in ((WORDS, "layers."), (INSTRUCTION, "layers.0.self_attn.q_proj")):
        scores = []
        for image in images[:2]:
            model = adapt(copy.deepcopy(llava), **form)
            model(input_ids=rows[0][None], images=image[None])
            scores.append({name: route.score_A for name, route in model.base_model.routes().items()})
        blind = [name for name in scores[0] if layers_without in name]
        assert len(blind) == (14 if form is WORDS else 1)
        assert all(torch.equal(scores[0][name], scores[1][name]) for name in blind)
        assert form is WORDS or any(not torch.allclose(scores[0][n], scores[1][n], atol=1e-4) for n in scores[0])


def test_instruction_is_the_text_around_its_image(llava, instances):
    rows, images = instances
    model = adapt(llava, **WORDS)
    for b, row in enumerate(rows):
        model(input_ids=row[None], images=images[b : b + 1])
        about_image = torch.stack([route.score_A for route in model.base_model.routes().values()])
        model(input_ids=row[row != IMAGE][None])
        text_alone = torch.stack([route.score_A for route in model.base_model.routes().values()])
        torch.testing.assert_close(about_image, text_alone)


@pytest.mark.parametrize("form", [INSTRUCTION, WORDS], ids=["instruction", "words"])
def test_instruction_without_text_is_refused_in_one_line(llava, instances, form):
    _, images = instances
    model = adapt(llava, **form)
    ids = torch.stack([torch.tensor([7, IMAGE]), torch.tensor([0, IMAGE])])
    mask = torch.tensor([[1, 1], [0, 1]])
    message = message_of(model, input_ids=ids, attention_mask=mask, images=images[:2])
    assert "instance 1" in message and "image features alone" in message


def test_instruction_needs_to_know_where_image_features_are(llava, instances):
    model = adapt(llava, **INSTRUCTION)
    message = message_of(model, inputs_embeds=torch.randn(1, 5, 32))
    assert "inputs_embeds" in message and "known_prompt" in message
    with known_prompt(prompt=torch.tensor([[True, True, False, False, True]])):
        assert model(inputs_embeds=torch.randn(1, 5, 32)).logits.shape[1] == 5


@each_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_training_has_the_same_gradients(_llava, llava, copy_of, instances, use_reentrant, form):
    rows, images = instances
    full = [torch.cat([row, random_ids(2 + b, seed=b)]) for b, row in enumerate(rows)]
    labels = [torch.cat([torch.full_like(r, IGNORE), f[len(r) :]]) for r, f in zip(rows, full)]
    batch = {
        "input_ids": right_padded(full),
        "labels": right_padded(labels, IGNORE),
        "attention_mask": right_padded([torch.ones_like(row) for row in full]),
        "images": images,
    }
    plain, checkpointed = adapt(copy_of(_llava), **form).train(), adapt(llava, **form).train()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in checkpointed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@each_form
def test_generation_about_an_image_is_the_same_cached_and_uncached(llava, instances, form):
    rows, images = instances
    model = adapt(llava, **form)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for b, row in enumerate(rows):
        cached = model.generate(inputs=row[None], images=images[b : b + 1], **options)
        uncached = model.generate(inputs=row[None], images=images[b : b + 1], use_cache=False, **options)
        assert torch.equal(cached, uncached) and cached.shape[1] >= 8  # transformers 4.37 adds one


@each_form
def test_text_without_an_image_is_routed_too(llava, form):
    model = adapt(llava, **form)
    ids, mask = random_ids(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    together = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(together[0, :4], model(input_ids=ids[:1, :4]).logits[0], **CLOSE)


@each_form
def test_text_without_an_image_is_answered_as_it_is_routed(llava, form):
    """generate() gives the layers embeddings alone, of which nothing but its own arguments tells that they are text."""
    model, ids = adapt(llava, **form), random_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for images in ({}, {"images": None}):
        answer = model.generate(inputs=ids, **images, **options)
        first = answer[:, answer.shape[1] - 4]  # transformers 4.37 adds one in front
        assert torch.equal(first, model(input_ids=ids).logits[:, -1].argmax(dim=-1))


@each_form
def test_conversation_about_an_image_is_answered_as_it_was_trained(llava, instances, form):
    """The second question's prompt quotes the first answer, in training by its labels and here by a mask."""
    rows, images = instances
    model = adapt(llava, **form)
    first, question, second = random_ids(2, seed=7), random_ids(4, seed=8), random_ids(3, seed=9)
    history = torch.cat([rows[0], first, question])[None]
    answers = torch.zeros_like(history, dtype=torch.bool)
    answers[:, len(rows[0]) : len(rows[0]) + 2] = True
    ids = torch.cat([history, second[None]], dim=1)
    labels = torch.where(nn.functional.pad(answers, (0, 3), value=True), ids, IGNORE)
    trained = model(input_ids=ids, labels=labels, images=images[:1]).logits[:, : history.shape[1] + 3]
    with known_prompt(answers=answers):
        fresh = model(input_ids=history, images=images[:1]).logits
        torch.testing.assert_close(fresh, trained, **CLOSE)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached = model.generate(inputs=history, images=images[:1], **options)
        assert torch.equal(model.generate(inputs=history, images=images[:1], use_cache=False, **options), cached)
    assert not torch.allclose(model(input_ids=history, images=images[:1]).logits, fresh, atol=1e-3)


def test_mask_that_does_not_fit_the_tokens_is_refused_in_one_line(llava, instances):
    rows, images = instances
    model = adapt(llava)
    with known_prompt(prompt=torch.ones(1, 2, dtype=torch.bool)):
        for call, name in ((model, "input_ids"), (model.generate, "inputs")):
            message = message_of(call, **{name: rows[0][None]}, images=images[:1])
            assert "(1, 2)" in message and "one value for each" in message
