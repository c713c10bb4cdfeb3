"""The load-balancing term: the loss and the gradients of a plainly written reference, however they are computed."""

import inspect

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from llava_mixlora import MixLoraError
from llava_mixlora.method.model_inputs import IGNORE_INDEX
from llava_mixlora.method.router_loss import load_balance

from ...tiny import layers, paper_form, random_ids, randomise

WEIGHT = 0.7
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
CHECKPOINTING_IDS = ["none", "reentrant", "non-reentrant"]
CLOSE = {"atol": 1e-6, "rtol": 1e-4}


def adapt(model, checkpointing=None, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = randomise(get_peft_model(model, paper_form(**options))).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def batch(seed, rows=3):
    ids = random_ids(rows, 8, seed=seed)
    labels = ids.clone()
    labels[:, : 2 + seed] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def reference_loss(model, inputs):
    """The loss with the term, from the formula; `model` is adapted with weight zero and keeps its graph."""
    routes = []
    handles = [watch(layer, routes) for layer in layers(model).values()]
    loss = model(**inputs).loss
    for handle in handles:
        handle()
    terms = []
    for route in routes:
        for score, index in ((route.score_A, route.index_A), (route.score_B, route.index_B)):
            P = torch.stack([row / row.sum() for row in score]).mean(0)
            f = torch.tensor([(index == e).float().mean() for e in range(score.shape[1])])
            terms.append(score.shape[1] * sum(f[e] * P[e] for e in range(score.shape[1])))
    assert len(terms) == 28
    return loss + WEIGHT * sum(terms) / len(terms)


def watch(layer, routes):
    """Collect the routes of a layer with their graph."""
    route_of = layer._route

    def route(*args):
        routes.append(route_of(*args))
        return routes[-1]

    layer._route = route
    return lambda: layer.__dict__.pop("_route")


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model, reference):
    expected, actual = gradients(reference), gradients(model)
    assert actual.keys() == expected.keys() and len(expected) == 14 * 5
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_even_choices_of_an_undecided_router_are_one():
    score, index = torch.full((3, 6), 1 / 6), torch.tensor([[0, 1], [2, 3], [4, 5]])
    torch.testing.assert_close(load_balance(score, index), torch.tensor(1.0))
    torch.testing.assert_close(load_balance(2 * score, index), torch.tensor(1.0))


def test_one_preferred_factor_is_the_worst():
    score = nn.functional.one_hot(torch.tensor([2, 2]), 6).float()
    torch.testing.assert_close(load_balance(score, torch.tensor([[2], [2]])), torch.tensor(6.0))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=CHECKPOINTING_IDS)
def test_loss_and_gradients_equal_the_reference(_llama, llama, copy_of, checkpointing):
    reference = adapt(copy_of(_llama))
    expected = reference_loss(reference, batch(0))
    expected.backward()
    model = adapt(llama, checkpointing, balance_loss_weight=WEIGHT)
    loss = model(**batch(0)).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=CHECKPOINTING_IDS)
def test_accumulated_and_scaled_gradients_equal_the_reference(_llama, llama, copy_of, checkpointing):
    """One batch by itself, then two in one backward pass, each with a scale of its own."""
    reference = adapt(copy_of(_llama))
    (reference_loss(reference, batch(0)) / 4).backward()
    (3 * reference_loss(reference, batch(1)) + reference_loss(reference, batch(2, rows=1)) / 2).backward()
    model = adapt(llama, checkpointing, balance_loss_weight=WEIGHT)
    (model(**batch(0)).loss / 4).backward()
    (3 * model(**batch(1)).loss + model(**batch(2, rows=1)).loss / 2).backward()
    assert_same_gradients(model, reference)


def test_term_has_an_effect_on_every_router(_llama, llama, copy_of):
    without, model = adapt(copy_of(_llama)), adapt(llama, balance_loss_weight=WEIGHT)
    for each in (without, model):
        each(**batch(0)).loss.backward()
    for name, gradient in gradients(model).items():
        if "router" in name or "cfs" in name:
            assert not torch.allclose(gradient, gradients(without)[name], atol=1e-7), name


def test_zero_weight_changes_no_bit(_llama, llama, copy_of):
    default, zero = adapt(copy_of(_llama)), adapt(llama, balance_loss_weight=0.0)
    losses = [model(**batch(0)).loss for model in (default, zero)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, gradient in gradients(default).items():
        assert torch.equal(gradients(zero)[name], gradient)


def test_term_belongs_to_the_loss_and_not_to_the_logits(_llama, llama, copy_of):
    without, model = adapt(copy_of(_llama)), adapt(llama, balance_loss_weight=WEIGHT)
    for each in (without, model):
        each(**batch(0)).logits.square().mean().backward()
    for name, gradient in gradients(without).items():
        assert torch.equal(gradients(model)[name], gradient)


@pytest.mark.skipif(
    "kwargs" not in inspect.signature(LlamaForCausalLM.forward).parameters,
    reason="transformers 4.37 does not count the tokens of all batches",
)
def test_loss_of_several_batches_counts_the_term_by_their_tokens(_llama, llama, copy_of):
    """Trainer lets some models divide by the tokens of all accumulated batches."""
    batches = [batch(0), batch(3)]
    tokens = [(inputs["labels"][:, 1:] != IGNORE_INDEX).sum() for inputs in batches]
    reference = adapt(copy_of(_llama))
    sum(reference_loss(reference, inputs) * n / sum(tokens) for inputs, n in zip(batches, tokens)).backward()
    model = adapt(llama, balance_loss_weight=WEIGHT)
    for inputs in batches:
        model(**inputs, num_items_in_batch=sum(tokens)).loss.backward()
    assert_same_gradients(model, reference)


def test_evaluation_has_no_term(_llama, llama, copy_of):
    without, model = adapt(copy_of(_llama)).eval(), adapt(llama, balance_loss_weight=WEIGHT).eval()
    assert torch.equal(model(**batch(0)).loss, without(**batch(0)).loss)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**batch(0)).loss, without(**batch(0)).loss)


def test_tuple_output_gains_the_term_too(llama):
    model = adapt(llama, balance_loss_weight=WEIGHT)
    assert torch.equal(model(**batch(0), return_dict=False)[0], model(**batch(0)).loss)


def test_only_the_adapter_with_the_weight_is_balanced(llama):
    model = adapt(llama, balance_loss_weight=WEIGHT)
    model.add_adapter("plain", paper_form(r=2, num_factors=6, task_type="CAUSAL_LM"))
    with_term = model(**batch(0)).loss
    with_term.backward()
    model.set_adapter("plain")
    assert "Add" not in type(model(**batch(0)).loss.grad_fn).__name__ and "Add" in type(with_term.grad_fn).__name__


def test_forward_without_a_loss_is_refused_in_one_line(llama):
    model = adapt(llama, balance_loss_weight=WEIGHT)
    with pytest.raises(MixLoraError, match="pass labels, or set balance_loss_weight=0") as error:
        model(input_ids=random_ids(1, 4))
    assert "\n" not in str(error.value)
    model(**batch(0)).loss.backward()


def test_failing_forward_keeps_its_own_error(llama):
    model = adapt(llama, balance_loss_weight=WEIGHT)
    with pytest.raises(ValueError, match="broken head"):
        model.base_model.model.lm_head.register_forward_pre_hook(fail)
        model(**batch(0))


def fail(*_):
    raise ValueError("broken head")
