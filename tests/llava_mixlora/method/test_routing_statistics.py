"""Counts of the routers' choices: what they mean, and that training counts each instance once."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llava_mixlora.method.mixture import Route, core
from llava_mixlora.method.routing_statistics import (
    choices,
    dead_share,
    router_entropy,
    usage_balance,
    usage_entropy,
)

from ...tiny import layers, paper_form, random_ids, randomise

E, R = 6, 2
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


def adapt(model, **options):
    options = {"r": R, "num_factors": E, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(model, paper_form(**options))).train()


def usage(model, adapter="default"):
    return torch.stack([layer.mixlora_stats_usage[adapter] for layer in layers(model).values()])


def counted_from_routes(model, adapter="default"):
    """The counts of the last forward pass, from the routes that it took."""
    routes = [layer.last_routes[adapter] for layer in layers(model).values()]
    return torch.stack(
        [
            torch.stack([torch.bincount(index.flatten(), minlength=E) for index in (route.index_A, route.index_B)])
            for route in routes
        ]
    )


def train(model, seed=0, rows=3):
    ids = random_ids(rows, 7, seed=seed)
    return model(input_ids=ids, labels=ids).loss


# --- the figures


def test_even_use_is_one_and_one_sided_use_is_the_least():
    even, one_sided = torch.full((8,), 5), torch.tensor([9, 9, 0, 0, 0, 0, 0, 0])
    assert usage_entropy(even) == 1 and usage_balance(even) == 1 and dead_share(even) == 0
    assert usage_entropy(one_sided).item() == pytest.approx(math.log(2) / math.log(8))
    assert usage_balance(one_sided) == 2 / 8 and dead_share(one_sided) == 6 / 8


def test_unused_pool_is_dead_and_has_no_balance():
    unused = torch.zeros(4, dtype=torch.int64)
    assert dead_share(unused) == 1 and usage_entropy(unused).isnan() and usage_balance(unused).isnan()


def test_only_factor_is_evenly_used():
    assert usage_entropy(torch.tensor([3])) == 1 and usage_balance(torch.tensor([3])) == 1


def test_sure_router_has_no_entropy_and_undecided_router_all_of_it():
    scores = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [2.0, 0, 2.0, 0]])
    torch.testing.assert_close(router_entropy(scores), torch.tensor([0, 1, 0.5], dtype=torch.float64))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any))
def test_figures_stay_in_their_documented_ranges(counts):
    counts = torch.tensor(counts)
    assert 0 <= usage_entropy(counts) <= 1 + 1e-12
    assert 1 / len(counts) - 1e-12 <= usage_balance(counts) <= 1 + 1e-12
    assert 0 <= dead_share(counts) < 1


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 2**16))
def test_every_choice_is_read_off_the_cores(B, r, seed):
    generator = torch.Generator().manual_seed(seed)
    index_A, index_B = (torch.rand(B, 6, generator=generator).topk(r).indices for _ in range(2))
    counts = choices(core(Route(index_A, index_B, None, None), 6, -0.5, False, torch.bfloat16))
    for e in range(6):
        assert counts[:, e].tolist() == [(index_A == e).sum(), (index_B == e).sum()]


# --- when a layer counts


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("routing", ["ifs_cfs", "random"])
def test_training_counts_each_instance_once(llama, checkpointing, routing):
    model = adapt(llama, routing=routing)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    first = train(model)
    expected = counted_from_routes(model)
    second = train(model, seed=1, rows=2)
    expected += counted_from_routes(model)
    (first + second).backward()
    assert torch.equal(usage(model), expected) and usage(model).sum() == 14 * 2 * R * 5


def test_backward_twice_counts_no_more(llama):
    model = adapt(llama)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = train(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert usage(model).sum() == 14 * 2 * R * 3


def test_nothing_but_training_is_counted(llama):
    model = adapt(llama)
    with torch.no_grad():
        train(model)
    train(model.eval())
    model.generate(input_ids=random_ids(1, 3), max_new_tokens=2)
    model.train()
    with model.disable_adapter():
        train(model)
    assert not usage(model).any()


def test_only_active_adapters_count(llama):
    model = adapt(llama)
    model.add_adapter("second", paper_form(r=1, num_factors=E, task_type="CAUSAL_LM"))
    train(model)
    model.set_adapter("second")
    train(model)
    assert usage(model).sum() == 14 * 2 * R * 3 and usage(model, "second").sum() == 14 * 2 * 1 * 3
    model.delete_adapter("default")
    assert all(list(layer.mixlora_stats_usage.keys()) == ["second"] for layer in layers(model).values())


# --- where the counts live


def test_counts_are_no_parameters_and_keep_their_type(llama):
    model = adapt(llama)
    train(model)
    expected = usage(model).clone()
    assert not any("stats" in name for name, _ in model.named_parameters())
    model.to(torch.bfloat16)
    assert usage(model).dtype == torch.int64 and torch.equal(usage(model), expected)


def test_counts_are_copied_and_pickled(llama):
    model = adapt(llama)
    train(model)
    expected = usage(model).clone()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(usage(other), expected)
        train(other)
    assert torch.equal(usage(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_counts_are_saved_without_being_asked_for_and_loaded(llama, llama_folder, tmp_path, low_cpu_mem_usage):
    """Upstream's `train()` passes a state dict of parameters only."""
    model = adapt(llama)
    train(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    model.save_pretrained(tmp_path, state_dict=parameters)
    base = LlamaForCausalLM.from_pretrained(llama_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert usage(model).any() and torch.equal(usage(loaded), usage(model))
    train(loaded.train())
    assert usage(loaded).sum() == 2 * usage(model).sum()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_saved_without_counts_loads_without_a_warning(
    llama, llama_folder, tmp_path, low_cpu_mem_usage, recwarn
):
    model = adapt(llama)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if "stats" not in name}, weights)
    base = LlamaForCausalLM.from_pretrained(llama_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not usage(loaded).any() and usage(loaded).device.type == "cpu"
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
