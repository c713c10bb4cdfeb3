"""The study of merging: what it sums up, and the candidate that the command does not offer."""

import itertools

import torch
from peft import get_peft_model

from llava_mixlora.merging.static_model import static_in_place
from playground.studies.merge_study import ALL, BOOKS, TEN, summary, table
from playground.studies.sequential_calibration import sequential

from ...tiny import paper_form, random_ids, randomise


def figures(dynamic, static):
    return {"dynamic": dynamic, "static": static, "kl": 0.5, "same_token": 90.0}


def test_losses_are_summed_up_by_kind_of_task_with_their_spread_over_adapters():
    adapters = {
        "words, seed 0": {"64 samples, mean": {"shape": figures(100, 90), "book teal": figures(90, 40)}},
        "words, seed 1": {"64 samples, mean": {"shape": figures(100, 80), "book teal": figures(90, 40)}},
        "paper, seed 0": {"64 samples, mean": {"shape": figures(100, 100), "book teal": figures(20, 20)}},
    }
    found = summary(adapters)
    of_words = found["words"]["64 samples, mean"]
    assert of_words[TEN]["static"] == {"mean": 85, "spread": 7.0711} and of_words[TEN]["adapters"] == 2
    assert of_words[BOOKS]["lost"] == {"mean": 50, "spread": 0} and of_words[ALL]["lost"]["mean"] == 32.5
    assert found["paper"]["64 samples, mean"][ALL]["lost"] == {"mean": 0, "spread": None}
    assert "| 64 samples, mean | 2 | 85.0 ± 7.1% | 40.0 ± 0.0% | 62.5 ± 3.5% | 32.5 ± 3.5 |" in table(
        {"summary": found}
    )


def test_sequential_calibration_is_exact_where_there_is_one_route(llama):
    model = randomise(get_peft_model(llama, paper_form(r=1, num_factors=1, task_type="CAUSAL_LM")), scale=0.3).eval()
    batches = [{"input_ids": random_ids(4, 20, seed=seed)} for seed in range(8)]
    found = sequential(model, lambda title: itertools.chain(batches))
    ids = random_ids(2, 12, seed=50)
    with torch.no_grad():
        dynamic = model(input_ids=ids).logits
        with static_in_place(model, found):
            static = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    assert (static - dynamic).abs().max() < 0.02 * (without - dynamic).abs().max()
