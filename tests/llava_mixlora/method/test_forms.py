"""The further forms of the method keep every invariant that the paper's form keeps."""

import copy
import json
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from llava_mixlora import MixLoraConfig
from llava_mixlora.method.mixture import conditional_table
from llava_mixlora.method.task_subsets import task_subsets

from ...tiny import layers, message_of, paper_form, random_ids, randomise

E, R = 6, 2
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TASKS = ["caption", "count", "read"]
FORMS = {
    "same": {"pairing": "same"},
    "same, zero routers": {"pairing": "same", "router_init": "zero"},
    "same, random": {"pairing": "same", "routing": "random"},
    "same, instruction": {"pairing": "same", "router_scope": "instruction"},
    "same, step": {"pairing": "same", "decode_routing": "step"},
    "same, words": {"pairing": "same", "router_scope": "instruction", "router_input": "words"},
    "rank, words of the prompt": {"router_input": "words"},
    "rank, words of the sequence": {"routing": "ifs", "router_input": "words", "router_scope": "sequence"},
    "tasks": {"pairing": "same", "router_input": "words", "task_loss_weight": 0.5, "tasks": TASKS},
    "rank, tasks": {"routing": "ifs", "task_loss_weight": 0.5, "tasks": TASKS},
    "table": {"cfs": "table", "cfs_temperature": 0.3},
    "sharp cfs": {"cfs_temperature": 0.05},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_example = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def adapt(model, form, randomised=True, **options):
    options = {"r": R, "num_factors": E, "lora_alpha": 8, "task_type": "CAUSAL_LM", **FORMS[form], **options}
    model = get_peft_model(model, paper_form(**options))
    if randomised:
        randomise(model)
        see_words(model)
    return model.eval()


def see_words(model, seed=9):
    """Give routers that see words something to centre by."""
    if model.peft_config["default"].router_input == "words":
        with torch.no_grad():
            embedded = model.get_input_embeddings()(random_ids(4, 6, seed=seed)).mean(dim=1).double()
        sums = model.get_base_model().mixlora_stats_words["default"].view(torch.float64)
        sums.copy_(torch.cat([embedded.sum(dim=0), torch.tensor([float(len(embedded))]).double()]))


def batch(lengths, seed=0, side="right", answers=2):
    """Prompts of these lengths with an answer each, and their tasks."""
    longest = max(lengths) + answers
    ids, labels, mask = (torch.zeros(len(lengths), longest, dtype=torch.long) for _ in range(3))
    labels -= 100
    for row, length in enumerate(lengths):
        spoken = slice(0, length + answers) if side == "right" else slice(longest - length - answers, longest)
        ids[row, spoken] = random_ids(length + answers, seed=seed + row)
        mask[row, spoken] = 1
        begin = spoken.start + length
        labels[row, begin : begin + answers] = ids[row, begin : begin + answers]
    tasks = torch.arange(len(lengths)) % len(TASKS)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "mixlora_tasks": tasks}


def greedy(model, ids, **options):
    defaults = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, **{**defaults, **options})[:, ids.shape[1] :]


def trained(model, steps=3, rate=0.05, seed=0):
    """The model after a few steps of training."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(steps):
        model(**batch([4, 6, 5], seed=seed + 10 * step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# --- the update itself


@pytest.mark.parametrize("form", ["same", "same, random", "same, words"])
def test_factors_of_one_pool_meet_those_of_the_same_number(llama, form):
    model = adapt(llama, form)
    seen = {}
    outputs = {}
    for name, layer in layers(model).items():
        layer.observer = lambda *what, name=name: seen.setdefault(name, what)
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, output))
    model(**batch([5, 3, 4]))
    for name, layer in layers(model).items():
        _, _, x, _, cores, _ = seen[name]
        chosen = layer.last_routes["default"].index_A
        assert torch.equal(chosen, layer.last_routes["default"].index_B)
        A, B = layer.mixlora_A["default"], layer.mixlora_B["default"]
        expected = torch.zeros(*x.shape[:2], layer.out_features)
        for row, factors in enumerate(chosen):
            for e in factors:
                expected[row] += 4 * torch.outer(x[row] @ A[e], B[e])  # lora_alpha / r
        torch.testing.assert_close(x @ A.t() @ cores @ B, expected, **CLOSE)
        torch.testing.assert_close(outputs[name] - layer.base_layer(x), expected, **CLOSE)


def test_one_router_chooses_by_the_paper_s_scores(llama):
    model = adapt(llama, "same")
    seen = {}
    for name, layer in layers(model).items():
        layer.observer = lambda *what, name=name: seen.setdefault(name, what[2])
    model(input_ids=random_ids(3, 7))
    for name, layer in layers(model).items():
        scores = (seen[name].mean(dim=1) @ layer.mixlora_router_A["default"].t()).softmax(dim=-1)
        route = layer.last_routes["default"]
        torch.testing.assert_close(route.score_A, scores)
        assert torch.equal(route.index_A, scores.topk(R).indices)
        assert not dict(layer.mixlora_router_B) and not dict(layer.mixlora_cfs)


def test_trained_table_routes_as_the_weights_that_make_it(_llama, llama, copy_of):
    by_weights = randomise(get_peft_model(llama, paper_form(r=R, num_factors=E, task_type="CAUSAL_LM"))).eval()
    options = {"r": R, "num_factors": E, "task_type": "CAUSAL_LM", "cfs": "table"}
    by_table = randomise(get_peft_model(copy_of(_llama), paper_form(**options))).eval()
    for name, layer in layers(by_weights).items():
        other = layers(by_table)[name]
        for kind in ("mixlora_A", "mixlora_B", "mixlora_router_A", "mixlora_router_B"):
            getattr(other, kind)["default"].data.copy_(getattr(layer, kind)["default"])
        table = conditional_table(layer.mixlora_A["default"].detach(), layer.mixlora_cfs["default"].detach())
        assert table.shape == other.mixlora_cfs["default"].shape == (R, E, E)
        other.mixlora_cfs["default"].data.copy_(table)
    inputs = batch([5, 3, 4])
    with torch.no_grad():  # by the table of the weights, once for all
        assert torch.equal(by_weights(**inputs).logits, by_table(**inputs).logits)
    torch.testing.assert_close(by_weights.train()(**inputs).logits, by_table(**inputs).logits, **CLOSE)
    for name, route in by_weights.base_model.routes().items():
        assert torch.equal(route.index_B, by_table.base_model.routes()[name].index_B)


def test_table_of_inference_follows_the_weights(llama):
    """It is kept from call to call, so a changed weight must make it anew."""
    model = adapt(llama, "sharp cfs")
    inputs = batch([5, 3, 4])

    def chosen():
        with torch.no_grad():
            model(**inputs)
        return torch.stack([route.score_B for route in model.base_model.routes().values()])

    before = chosen()
    assert torch.equal(chosen(), before)
    for layer in layers(model).values():
        with torch.no_grad():
            layer.mixlora_cfs["default"].copy_(layer.mixlora_cfs["default"].flip(1))
    after = chosen()
    assert not torch.allclose(before, after)
    fresh = copy.deepcopy(model)
    for layer in layers(fresh).values():
        layer._cfs_tables.clear()
    model = fresh
    assert torch.equal(chosen(), after)


def test_low_temperature_lets_cfs_decide(_llama, llama, copy_of):
    spread = {}
    for temperature in (1.0, 0.05):
        options = {"r": R, "num_factors": E, "task_type": "CAUSAL_LM", "cfs_temperature": temperature}
        model = get_peft_model(copy_of(_llama), paper_form(**options)).eval()
        torch.manual_seed(3)
        for layer in layers(model).values():
            layer.mixlora_cfs["default"].data.uniform_(-0.2, 0.2)
        with torch.no_grad():
            model(input_ids=random_ids(3, 7))
        routes = model.base_model.routes().values()
        spread[temperature] = torch.stack([route.score_B.std(dim=-1).mean() for route in routes]).mean()
    assert spread[0.05] > 2 * spread[1.0]


# --- the invariants


@each_form
def test_fresh_adapter_has_no_effect(llama, form):
    inputs = {"input_ids": random_ids(3, 7)}
    expected = llama(**inputs).logits
    assert torch.equal(adapt(llama, form, randomised=False)(**inputs).logits, expected)


@each_example
@given(
    form=st.sampled_from([*FORMS]),
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 2**16),
)
def test_neither_batch_mates_nor_padding_nor_answers_change_a_route(_llama, copy_of, form, lengths, side, seed):
    model = adapt(copy_of(_llama), form)
    together = batch(lengths, seed, side)
    if FORMS[form].get("router_scope") == "sequence":
        del together["labels"]
    with torch.no_grad():
        logits = model(**together).logits
        scores = {name: route.score_A for name, route in model.base_model.routes().items()}
        for row, mask in enumerate(together["attention_mask"].bool()):
            alone = together["input_ids"][row : row + 1, mask]
            prompt = alone if "labels" not in together else alone[:, : lengths[row]]
            if FORMS[form].get("decode_routing") != "step":
                expected = logits[row, mask][: prompt.shape[1]]
                torch.testing.assert_close(model(input_ids=prompt).logits[0], expected, **CLOSE)
            else:
                model(input_ids=prompt)
            for name, route in model.base_model.routes().items():
                if scores[name] is not None:
                    torch.testing.assert_close(route.score_A[0], scores[name][row], **CLOSE)


@each_form
def test_cache_and_beams_keep_the_routes_of_the_prompt(llama, form):
    model = adapt(llama, form)
    ids = random_ids(3, 6)
    if FORMS[form].get("decode_routing") != "step":
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))
        assert torch.equal(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))
    assert torch.equal(greedy(model, ids)[1:2], greedy(model, ids[1:2]))


@each_form
def test_threads_do_not_see_each_other_s_routes(llama, form):
    model = adapt(llama, form)
    prompts = [random_ids(1, length, seed=length) for length in (3, 5, 8, 6)]
    alone = [greedy(model, ids) for ids in prompts]
    found = [None] * len(prompts)

    def answer(number):
        found[number] = [greedy(model, prompts[number]) for _ in range(3)]

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, alone[number]) for number in range(len(prompts)) for each in found[number])


@each_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient_of_two_forwards(_llama, copy_of, form, use_reentrant):
    gradients = []
    for checkpointing in (None, {"use_reentrant": use_reentrant}):
        torch.manual_seed(0)  # of random routes
        model = adapt(copy_of(_llama), form).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        losses = [model(**batch(lengths, seed)).loss for seed, lengths in ((1, [4, 6, 3]), (2, [5, 5, 4]))]
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        sums = model.get_base_model()._modules.get("mixlora_stats_words")
        if sums is not None:  # counted once, whatever a checkpoint runs again
            assert sums["default"].view(torch.float64)[-1] == 4 + 6
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        if "router" in name or "cfs" in name:
            assert gradient.abs().max() > 0, name


@each_form
def test_saved_adapter_gives_the_same_logits_bit_for_bit(_llama, llama, copy_of, form, tmp_path):
    model = trained(adapt(llama, form))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy_of(_llama), tmp_path).eval()
    inputs = {"input_ids": random_ids(3, 7)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all("mixlora_" in name for name in names)
    assert any("router_B" in name for name in names) == (FORMS[form].get("pairing", "rank") == "rank")
    words = [name for name in names if "stats_words" in name]
    assert len(words) == (FORMS[form].get("router_input") == "words")
    again = dict(copy.deepcopy(loaded.peft_config["default"]).to_dict())
    assert again["pairing"] == FORMS[form].get("pairing", "rank")


@pytest.mark.parametrize("form", ["same", "same, instruction", "same, words", "rank, words of the prompt", "table"])
def test_one_route_for_all_merges_exactly(llama, form):
    """Routers that give every factor the same choose the same for every instance."""
    model = adapt(llama, form)
    for name, parameter in model.named_parameters():
        if "router" in name or "cfs" in name:
            parameter.data.zero_()
    model.train()
    model(**batch([4, 6, 5]))
    inputs = {"input_ids": random_ids(3, 7)}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        merged = model.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(merged, expected, **CLOSE)


@each_form
def test_unloading_leaves_the_base_as_it_was(_llama, llama, form):
    base = adapt(llama, form).unload()
    assert base.state_dict().keys() == _llama.state_dict().keys()
    assert not any("mixlora" in name for name, _ in base.named_modules())
    inputs = {"input_ids": random_ids(3, 7)}
    assert torch.equal(base(**inputs).logits, _llama(**inputs).logits)
    assert not base.get_input_embeddings()._forward_hooks


def test_deleting_an_adapter_takes_its_sums_of_words(llama):
    model = adapt(llama, "same, words")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    sums = model.get_base_model().mixlora_stats_words
    assert set(sums) == {"default", "other"} and not sums["other"].any()
    model.delete_adapter("other")
    assert set(model.get_base_model().mixlora_stats_words) == {"default"}


def test_two_adapters_of_different_forms_serve_one_batch(llama):
    model = adapt(llama, "same, words")
    model.add_adapter("paper", paper_form(r=R, num_factors=E, lora_alpha=8, task_type="CAUSAL_LM"))
    randomise(model, seed=4)
    see_words(model)
    ids = random_ids(2, 6)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "paper"]).logits
        for row, name in enumerate(["default", "paper"]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0], **CLOSE)


# --- words


def test_routers_see_centred_words_of_unit_size_in_every_layer(llama):
    model = adapt(llama, "same, words")
    ids = random_ids(3, 7)
    with torch.no_grad():
        model(input_ids=ids)
        mean = model.get_input_embeddings()(ids).mean(dim=1)
        sums = model.get_base_model().mixlora_stats_words["default"].view(torch.float64).float()
        difference = mean - sums[:-1] / sums[-1]
        u = difference / difference.square().mean(dim=-1, keepdim=True).sqrt()
    for name, route in model.base_model.routes().items():
        router = layers(model)[f"base_model.model.{name}"].mixlora_router_A["default"]
        assert router.shape == (E, mean.shape[1])
        torch.testing.assert_close(route.score_A, (u @ router.t()).softmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instructions_that_are_all_alike_take_one_route_and_not_one_of_rounding(llama, dtype):
    model = randomise(adapt(llama, "same, words", randomised=False)).train()
    ids = random_ids(1, 7)
    for copies in (3, 1, 2):
        model(input_ids=ids.expand(copies, -1), labels=torch.where(torch.arange(7) < 4, -100, ids).expand(copies, -1))
    model.eval().to(dtype)
    with torch.no_grad():
        model(input_ids=ids[:, :4])
    for route in model.base_model.routes().values():
        assert (route.score_A == route.score_A[0, 0]).all()


def test_centre_is_the_mean_over_training_and_stays_after_the_warm_up(llama, monkeypatch):
    monkeypatch.setattr("llava_mixlora.method.word_centre.WARM_UP", 5)
    model = adapt(llama, "same, words", randomised=False).train()
    sums = model.get_base_model().mixlora_stats_words["default"].view(torch.float64)
    with torch.no_grad():
        model(**batch([4, 6]))  # no step of training
    assert not sums.any()
    expected = torch.zeros_like(sums)
    embeddings = model.get_input_embeddings()
    for seed, counts in ((0, True), (1, True), (2, False)):
        inputs = batch([4, 6, 5], seed)
        model(**inputs)
        if counts:
            for row, length in enumerate([4, 6, 5]):
                expected[:-1] += embeddings(inputs["input_ids"][row, :length]).mean(dim=0).double().detach()
            expected[-1] += 3
        torch.testing.assert_close(sums, expected)


def test_centring_survives_a_cast_to_half_precision(llama):
    model = adapt(llama, "same, words")
    before = model.get_base_model().mixlora_stats_words["default"].clone()
    assert torch.equal(model.half().get_base_model().mixlora_stats_words["default"], before)


@pytest.mark.parametrize("form", ["same, words", "rank, words of the prompt"])
def test_autocast_routes_by_words_as_without(llama, form):
    """Upstream trains under it, and answers without: an average in bfloat16 would be another route in a near tie."""
    model = adapt(llama, form).train()
    inputs = batch([4, 6, 5])
    twin = copy.deepcopy(model)
    model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        twin(**inputs)
    for name, route in model.base_model.routes().items():
        under_autocast = twin.base_model.routes()[name]
        assert under_autocast.score_A.dtype == torch.float32
        torch.testing.assert_close(under_autocast.score_A, route.score_A)


def test_failed_forward_counts_no_words(llama):
    model = adapt(llama, "same, words").train()
    before = model.get_base_model().mixlora_stats_words["default"].clone()
    layer = list(layers(model).values())[-1]
    handle = layer.base_layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(**batch([4, 5]))
    handle.remove()
    assert torch.equal(model.get_base_model().mixlora_stats_words["default"], before)


def test_only_adapters_that_are_in_use_count_words(llama):
    model = adapt(llama, "same, words", randomised=False).train()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with model.disable_adapter():
        model.get_input_embeddings().weight.requires_grad_(True)
        model(**batch([4, 5]))
    sums = model.get_base_model().mixlora_stats_words
    assert not sums["default"].any() and not sums["other"].any()
    model(**batch([4, 5]))
    assert sums["default"].any() and not sums["other"].any()


def test_words_reach_layers_that_embeddings_are_given_to(llama):
    model = adapt(llama, "same, words")
    ids = random_ids(2, 6)
    with torch.no_grad():
        by_ids = model(input_ids=ids).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(by_embeddings, by_ids)


@pytest.mark.parametrize("form", ["same, words", "rank, words of the prompt"])
def test_routes_of_words_are_known_without_running_the_model(llama, form):
    model = adapt(llama, form)
    inputs = {"input_ids": random_ids(3, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7])}
    known = model.base_model.routes_of_words(**inputs)
    with torch.no_grad():
        model(**inputs)
    run = model.base_model.routes()
    assert known.keys() == run.keys() and len(known) == 14
    for name, route in run.items():
        assert torch.equal(route.index_A, known[name].index_A) and torch.equal(route.index_B, known[name].index_B)


def test_routes_of_hidden_states_are_not_known_beforehand(llama):
    model = adapt(llama, "same")
    assert "router_input='words'" in message_of(model.base_model.routes_of_words, random_ids(1, 4))


# --- instructions


@pytest.mark.parametrize("form", ["same, instruction", "same, words"])
def test_a_turn_is_routed_by_its_own_question(llama, form):
    """Of the first layer's routers, which see words alone: what was said before does not reach them."""
    model = adapt(llama, form)
    first, second = random_ids(1, 5, seed=1), random_ids(1, 4, seed=2)
    answers = [random_ids(1, 2, seed=seed) for seed in (3, 4)]
    ids = torch.cat([first, answers[0], second, answers[1]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, 5:7], labels[:, 11:] = answers
    with torch.no_grad():
        model(input_ids=ids, labels=labels)
        turns = {name: route.score_A for name, route in model.base_model.routes().items()}
        for turn, question in enumerate((first, second)):
            model(input_ids=question)
            for name, route in model.base_model.routes().items():
                assert len(turns[name]) == 2
                if form == "same, words" or "layers.0.self_attn.q_proj" in name:
                    torch.testing.assert_close(route.score_A[0], turns[name][turn])


def test_whole_prompt_still_sees_earlier_turns(llama):
    model = adapt(llama, "same")
    ids = random_ids(1, 13)
    labels = torch.full_like(ids, -100)
    labels[:, 5:7], labels[:, 11:] = ids[:, 5:7], ids[:, 11:]
    with torch.no_grad():
        model(input_ids=ids, labels=labels)
        name, route = next(iter(model.base_model.routes().items()))
        second = route.score_A[1]
        model(input_ids=ids[:, 7:11])
    assert not torch.allclose(model.base_model.routes()[name].score_A[0], second, atol=1e-3)


# --- tasks


def test_training_takes_the_subsets_of_the_tasks_and_inference_what_the_router_says(llama):
    model = adapt(llama, "tasks")
    inputs = batch([4, 6, 5])
    with torch.no_grad():
        model(**inputs)
    free = {name: route.index_A for name, route in model.base_model.routes().items()}
    model.train()(**inputs)
    expected = task_subsets(len(TASKS), E, R)
    for route in model.base_model.routes().values():
        assert torch.equal(route.index_A, expected) and torch.equal(route.index_B, expected)
    assert any(not torch.equal(chosen.sort(dim=-1).values, expected) for chosen in free.values())


def test_router_learns_the_tasks_that_its_words_tell(llama):
    model = adapt(llama, "tasks", randomised=False, task_loss_weight=1.0).train()
    prompts = random_ids(3, 5, seed=40)
    ids = torch.cat([prompts, random_ids(3, 2, seed=41)], dim=1)
    labels = ids.clone()
    labels[:, :5] = -100
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "router" in n], 0.05)
    for _ in range(40):
        model(input_ids=ids, labels=labels, mixlora_tasks=torch.arange(3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()(input_ids=prompts)
    for route in model.base_model.routes().values():
        assert torch.equal(route.index_A.sort(dim=-1).values, task_subsets(3, E, R))


@pytest.mark.parametrize("form", ["tasks", "rank, tasks"])
def test_task_loss_joins_the_loss(_llama, copy_of, form):
    """Minus the mean log probability of the subsets: the mean over pools and layers, times its weight."""
    inputs, losses = batch([4, 6, 5]), []
    for weight in (0.5, 1e-9):
        model = adapt(copy_of(_llama), form, task_loss_weight=weight).train()
        losses.append(model(**inputs).loss)
    subsets = task_subsets(len(TASKS), E, R)
    terms = [
        -score.gather(1, subsets).log().mean()
        for route in model.base_model.routes().values()
        for score in (route.score_A, route.score_B)
    ]
    torch.testing.assert_close(losses[0] - losses[1], torch.stack(terms).mean() * 0.5, **CLOSE)


def test_batch_keeps_its_tasks_from_a_base_that_does_not_take_them(llama):
    """The adapted model takes the keyword in evaluation too, where it decides nothing."""
    model = adapt(llama, "same")
    inputs = batch([4, 5])
    with torch.no_grad():
        with_tasks = model(**inputs).logits
        del inputs["mixlora_tasks"]
        assert torch.equal(model(**inputs).logits, with_tasks)


# --- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairing": "both"}, "pairing='both': expected one of 'rank', 'same'"),
        ({"pairing": "same", "routing": "ifs_cfs"}, "pairing='same' chooses both at once"),
        ({"router_scope": "question"}, "router_scope='question': expected one of 'prompt', 'sequence', 'instruction'"),
        ({"router_scope": "instruction", "count_padding": True}, "count_padding=True averages padding"),
        ({"router_input": "words", "count_padding": True}, "count_padding=True averages padding"),
        ({"router_input": "words", "routing": "random"}, "which has no routers"),
        ({"router_init": "ones"}, "router_init='ones': expected one of 'uniform', 'zero'"),
        ({"cfs": "table", "routing": "ifs"}, "cfs='table' has no meaning with routing='ifs'"),
        ({"cfs": "table", "cfs_product": "sums"}, "cfs='table' trains the table itself"),
        ({"cfs_temperature": 0}, "cfs_temperature=0: expected a number above 0"),
        ({"cfs_temperature": 0.5, "pairing": "same"}, "cfs_temperature=0.5 has no meaning"),
        ({"task_loss_weight": 0.1, "routing": "ifs"}, "needs to know the tasks"),
        ({"task_loss_weight": -1, "routing": "ifs", "tasks": ["a"]}, "task_loss_weight=-1: expected a number"),
        ({"task_loss_weight": 0.1, "tasks": ["a", "b"], "routing": "ifs_cfs"}, "with routing='ifs_cfs'"),
        ({"task_loss_weight": 0.1, "routing": "random", "tasks": ["a"]}, "routing='random' leaves none to train"),
        ({"tasks": ["a", "a"]}, "tasks=['a', 'a']: expected a list of different names"),
        ({"tasks": "a"}, "tasks='a': expected a list"),
        (
            {"task_loss_weight": 1, "pairing": "same", "num_factors": 4, "r": 3, "tasks": list("abcde")},
            "tasks: 5 of them, but r=3 of num_factors=4 makes only 4 different subsets",
        ),
    ],
)
def test_contradicting_options_are_named_in_one_line(options, message):
    assert message in message_of(MixLoraConfig, **options)


def test_words_need_input_embeddings():
    """A model that has none, or does not say which they are."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            return self.proj(x)

    config = MixLoraConfig(r=1, num_factors=2, target_modules=["proj"], pairing="same", router_input="words")
    message = message_of(get_peft_model, Plain(), config)
    assert "router_input='words'" in message and "Plain" in message and "router_input='hidden'" in message


def test_words_are_not_for_encoder_decoders():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    message = message_of(get_peft_model, t5, MixLoraConfig(target_modules=["q"]))
    assert "T5ForConditionalGeneration" in message and "router_input='hidden'" in message and "SEQ_2_SEQ_LM" in message
    model = get_peft_model(t5, MixLoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    assert model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 3).long()).loss.isfinite()


def test_missing_or_wrong_tasks_are_named(llama):
    model = adapt(llama, "tasks").train()
    inputs = batch([4, 5])
    for tasks, told in ((None, "none were given"), (torch.tensor([0, 3]), "[0, 3]"), (torch.tensor([0]), "[0]")):
        message = message_of(model, **{**inputs, "mixlora_tasks": tasks})
        assert told in message and "llava_mixlora.TaskLabels" in message and "0 to 2" in message


def test_layer_by_itself_has_no_words(llama):
    model = adapt(llama, "same, words")
    layer = next(iter(layers(model).values()))
    assert "router_input='words'" in message_of(layer, torch.zeros(1, 3, layer.in_features))


# --- adapters of before


def test_configuration_without_the_new_fields_is_the_paper_s_form(llama, _llama, copy_of, tmp_path):
    model = randomise(get_peft_model(llama, paper_form(r=R, num_factors=E, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["format_version"] == 1  # so that versions before this one read it
    new = ("pairing", "router_input", "router_init", "cfs", "cfs_temperature", "task_loss_weight", "tasks")
    for name in new:
        del saved[name]
    file.write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(copy_of(_llama), tmp_path).eval()
    assert loaded.peft_config["default"].pairing == "rank" and loaded.peft_config["default"].routing == "ifs_cfs"
    inputs = {"input_ids": random_ids(3, 7)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", ["same", "same, instruction", "same, words", "table", "sharp cfs"])
def test_what_older_versions_would_read_wrongly_has_a_newer_format(form):
    assert MixLoraConfig(**FORMS[form]).format_version == 2
    assert MixLoraConfig(**FORMS[form]).routing == ("ifs" if "same" in form else "ifs_cfs")
