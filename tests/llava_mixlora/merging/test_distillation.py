"""Static stand-ins that are trained on what the dynamic model predicts."""

import itertools

import pytest
import torch
from peft import get_peft_model

from llava_mixlora.merging.distillation import distilled
from llava_mixlora.merging.judging import judge
from llava_mixlora.method.model import adapted_layers
from llava_mixlora.method.static_core import low_rank_pair, lstsq_core

from ...tiny import paper_form, random_ids, randomise


def adapted(llama, **form):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **form}
    model = randomise(get_peft_model(llama, paper_form(**options)), scale=0.3)
    for seed in range(3):
        ids = random_ids(4, 12, seed=seed)
        model.train()(input_ids=ids, labels=ids)
    return model.eval()


def batches(count=8, size=2):
    for seed in range(count):
        ids = random_ids(size, 10, seed=100 + seed)
        labels = ids.clone()
        labels[:, :6] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_statistics(model):
    def of(layer):
        core = lstsq_core(layer.moments("default"), layer.settings["default"].r * layer.settings["default"].scaling)
        return low_rank_pair(layer.mixlora_A["default"].detach(), layer.mixlora_B["default"].detach(), core)

    return {name: of(layer) for name, layer in adapted_layers(model).items()}


def agreement(model, updates, tasks=16 * (None,)):
    return judge(model, lambda title: batches(), {"static": updates}, tasks)[1]["static"]


@pytest.mark.parametrize("form", [{}, {"pairing": "same", "router_scope": "instruction"}])
def test_distilling_brings_the_next_tokens_nearer_and_keeps_rank_and_base(llama, form):
    model = adapted(llama, **form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = by_statistics(model)
    found = distilled(model, itertools.cycle(batches()), start, batch_size=2, steps=30)
    assert agreement(model, found).kl < 0.5 * agreement(model, start).kl
    assert {name: [m.shape for m in pair] for name, pair in found.items()} == {
        name: [m.shape for m in pair] for name, pair in start.items()
    }
    assert all(not matrix.requires_grad for pair in found.values() for matrix in pair)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_exact_stays_as_it_is(llama):
    model = adapted(llama)
    for name, parameter in model.named_parameters():
        if "router" in name or "cfs" in name:
            parameter.data.zero_()
    for layer in adapted_layers(model).values():
        layer.mixlora_stats_moments["default"].zero_()
    for seed in range(3):
        ids = random_ids(4, 12, seed=seed)
        model.train()(input_ids=ids, labels=ids)
    model.eval()
    start = by_statistics(model)
    found = distilled(model, itertools.cycle(batches()), start, batch_size=2, steps=30)
    assert found is start and agreement(model, found).kl < 1e-5


def test_a_step_is_the_same_in_batches_of_any_size(llama):
    model = adapted(llama)
    start = by_statistics(model)
    whole = list(batches(count=1, size=32))
    halves = [{name: tensor[part] for name, tensor in whole[0].items()} for part in (slice(0, 16), slice(16, 32))]
    found = distilled(model, itertools.cycle(whole), start, batch_size=32, steps=3)
    in_two = distilled(model, itertools.cycle(halves), start, batch_size=16, steps=3)
    for name, pair in found.items():
        for one, other in zip(pair, in_two[name]):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_judgement_is_told_by_task_too(llama):
    model = adapted(llama)
    tasks = [["color", "shape", None, 3][number % 4] for number in range(16)]
    updates = {"static": by_statistics(model)}
    _, of_all, by_task = judge(model, lambda title: batches(), updates, tasks)
    assert set(by_task["static"]) == {"color", "shape", "3"}
    assert all(found.samples == 4 and found.tokens == 16 for found in by_task["static"].values())
    assert of_all["static"].samples == 16 and of_all["static"].tokens == 64
    assert 0 <= of_all["static"].same_answer <= of_all["static"].same_token <= 1


def test_a_model_agrees_with_itself(llama):
    model = adapted(llama, r=1, num_factors=1)
    found = agreement(model, by_statistics(model))
    assert found.kl < 1e-6 and found.same_token == found.same_answer == 1
    assert found.loss_dynamic == pytest.approx(found.loss_static, abs=1e-5)
    assert found.right_dynamic == found.right_static
