"""How many operations an adapted linear layer starts beyond its base: bounds that it must not creep over.

They are the counts of today. A change that needs more than one of them has to say here what it is good for.
"""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from llava_mixlora import MixLoraConfig
from llava_mixlora.method.companions import separately
from playground.benchmarks.launches import KINDS, Launches, _of_model, added_per_linear, launches_of, of_decoder_layer
from playground.benchmarks.variants import TWO_ROUTERS

from ...tiny import LINEAR_LAYERS

pytestmark = pytest.mark.one_stack  # other versions write the layers around the linear ones in other operations


def config(form, adapter=MixLoraConfig):
    return lambda: adapter(**{"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM", **form})


LORA = config({"r": 16}, LoraConfig)
MOST = {
    # With gradient checkpointing: forward, backward (with the forward that is run again), decoding.
    "default": ({}, (3.3, 10.8, 3)),
    "dropout": ({"lora_dropout": 0.05}, (7.9, 18.6, 3)),
    "hidden": ({"router_input": "hidden"}, (6.5, 20.5, 3)),
    "two routers": ({**TWO_ROUTERS, "routing": "ifs"}, (8.5, 27, 3)),
    "CFS": ({**TWO_ROUTERS, "routing": "ifs_cfs"}, (19.6, 54.2, 3)),
    "balance": ({"balance_loss_weight": 0.1}, (5.3, 14.9, 3)),
}


@pytest.mark.parametrize("form", MOST)
def test_adapted_layer_starts_no_more_than_today(form):
    options, most = MOST[form]
    added = added_per_linear(config(options))
    assert all(added[kind] <= limit for kind, limit in zip(KINDS, most)), added


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_step_of_the_default_starts_no_more_than_one_of_lora(reentrant, autocast):
    ours, of_lora = (of_decoder_layer(each, reentrant=reentrant, autocast=autocast) for each in (config({}), LORA))
    assert ours["forward"] + ours["backward"] <= 1.04 * (of_lora["forward"] + of_lora["backward"])
    assert ours["decoding"] < of_lora["decoding"]


def test_a_generation_that_goes_on_asks_for_no_words_again():
    """They are an average for the whole model, so a layer's share of it does not show."""
    of_words, of_hidden_states = (_of_model(1, config(form), False) for form in ({}, {"router_input": "hidden"}))
    assert of_words["decoding"] == of_hidden_states["decoding"]


def test_working_together_is_what_saves():
    together = added_per_linear(config({}))
    with separately():
        apart = added_per_linear(config({}))
    for kind in KINDS:
        assert together[kind] < apart[kind]
    assert 2 * (together["forward"] + together["backward"]) < apart["forward"] + apart["backward"]


def test_views_and_allocations_are_no_launches():
    x = torch.randn(4, 6, requires_grad=True)
    assert launches_of(lambda: x.view(2, 12).t().unsqueeze(0).detach()) == 0
    assert launches_of(lambda: torch.empty(3)) == 0
    layer = nn.Linear(6, 5, bias=False)
    with Launches() as launches:
        layer(x).sum().backward()
    assert launches.counts == {"mm": 3, "sum": 1, "ones_like": 1}
    assert launches_of(lambda: x.data.add_(1)) == 1
