"""The plain LoRA of one prompt: with it in PEFT's own LoRA layers the base says what the adapted model says."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava_mixlora import MixLoraConfig, MixLoraError

from ...tiny import LINEAR_LAYERS, paper_form, random_ids, randomise

FORMS = {
    "default": {},
    "words": {"router_input": "words", "router_scope": "instruction", "pairing": "same"},
    "hidden, same": {"router_input": "hidden", "router_scope": "instruction", "pairing": "same"},
    "paper's form": {"router_input": "hidden", "router_scope": "prompt", "pairing": "rank"},
    "without cfs": {"router_input": "hidden", "router_scope": "prompt", "pairing": "rank", "routing": "ifs"},
    "sequence": {"router_input": "hidden", "router_scope": "sequence", "pairing": "rank"},
    "at random": {"routing": "random"},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
}


def adapted(llama, **options):
    return randomise(get_peft_model(llama, MixLoraConfig(num_factors=6, r=3, **options))).eval()


def with_lora(llama, lora):
    """The base with a LoRA of PEFT, of scaling 1."""
    ranks = {name: len(down) for name, (down, _) in lora.items()}
    rank = max(ranks.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(lora), rank_pattern=ranks, alpha_pattern=ranks)
    model = get_peft_model(llama, config).eval()
    for name, (down, up) in lora.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(down)
        layer.lora_B["default"].weight.data.copy_(up)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_base_with_the_lora_of_a_prompt_has_its_logits_and_answer(llama, copy_of, form):
    base = copy_of(llama).double()
    model = adapted(llama, **FORMS[form]).double()
    ids = random_ids(2, 9)
    first, second = model.loras_of_prompts(input_ids=ids)
    assert all(down.shape[1] and up.shape[1] == len(down) for down, up in first.values())
    assert len(first) == 14 and (form == "at random" or any(not torch.equal(first[n][0], second[n][0]) for n in first))
    for row, lora in enumerate((first, second)):
        plain, prompt = with_lora(copy_of(base), lora), ids[row : row + 1]
        with torch.no_grad():
            torch.testing.assert_close(plain(prompt).logits, model(prompt).logits, rtol=1e-9, atol=1e-9)
        told = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(plain.generate(prompt, **told), model.generate(prompt, **told))


def test_padding_and_batch_mates_change_no_lora(llama):
    model = adapted(llama, **FORMS["hidden, same"])
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    in_batch = model.loras_of_prompts(input_ids=ids, attention_mask=mask)[0]
    alone = model.lora_of_prompt(input_ids=ids[:1, 4:])
    assert all(torch.equal(in_batch[name][0], alone[name][0]) for name in alone)


def test_words_alone_tell_the_lora_without_running_the_model(llama, monkeypatch):
    model = adapted(llama, **FORMS["words"])
    ids = random_ids(1, 9)
    embedded = model.get_input_embeddings()(ids).detach()
    by_running = model.lora_of_prompt(inputs_embeds=embedded)
    monkeypatch.setattr(type(llama), "forward", None)
    by_words = model.lora_of_prompt(input_ids=ids)
    assert all(torch.equal(by_words[name][part], by_running[name][part]) for name in by_words for part in (0, 1))


def test_lora_of_one_of_several_adapters(llama):
    model = adapted(llama)
    model.add_adapter("other", paper_form(num_factors=6, r=2))
    randomise(model, seed=1).eval()
    ids = random_ids(1, 9)
    assert {len(down) for down, _ in model.lora_of_prompt("other", input_ids=ids).values()} == {2}
    assert model.active_adapter == "default"
    assert {len(down) for down, _ in model.lora_of_prompt(input_ids=ids).values()} == {3}


def refusals(llama):
    model = adapted(copy.deepcopy(llama))
    ids = random_ids(2, 9)
    yield "expected one", lambda: model.lora_of_prompt(input_ids=ids)
    yield "non-existing adapter", lambda: model.lora_of_prompt("none", input_ids=ids)
    yield "model without an adapter", lambda: model.lora_of_prompt("__base__", input_ids=ids)
    stepping = adapted(copy.deepcopy(llama), decode_routing="step")
    yield "decode_routing='step'", lambda: stepping.loras_of_prompts(input_ids=ids)
    training = adapted(copy.deepcopy(llama)).train()
    yield "training mode", lambda: training.loras_of_prompts(input_ids=ids)


def test_what_has_no_lora_says_so(llama):
    for words, ask in refusals(llama):
        with pytest.raises(MixLoraError, match=words):
            ask()


def test_conversation_has_several(llama):
    from llava_mixlora import known_prompt

    model = adapted(llama, **FORMS["hidden, same"])
    answers = torch.zeros(1, 9, dtype=torch.bool)
    answers[0, 3:5] = answers[0, 8] = True
    with known_prompt(answers=answers), pytest.raises(MixLoraError, match="routes of their own"):
        model.lora_of_prompt(input_ids=random_ids(1, 9))


def test_every_linear_layer_has_a_part(llama):
    lora = adapted(llama).lora_of_prompt(input_ids=random_ids(1, 9))
    assert {name.rpartition(".")[2] for name in lora} == set(LINEAR_LAYERS)
