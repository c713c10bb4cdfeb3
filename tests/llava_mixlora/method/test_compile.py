"""`torch.compile` of a whole model computes what the model computes, in few graphs that are made once."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters

from ...tiny import LINEAR_LAYERS, layers, paper_form, random_ids, randomise

pytestmark = pytest.mark.one_stack  # older transformers were not written to be compiled in one graph

LENGTHS = (12, 12, 9, 15, 11)
SOME_LAYERS = ["q_proj", "k_proj", "down_proj"]  # Dynamo takes its time for each
GRAPHS = 2  # the decoder; the head and the loss
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # q, k and v share one average where nothing is compiled


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapt(llama, target_modules=SOME_LAYERS, **options):
    options |= {"target_modules": target_modules, "task_type": "CAUSAL_LM"}
    config = paper_form(r=2, num_factors=6, lora_alpha=8, **options)
    return randomise(get_peft_model(llama, config))


def batch(length, kind="prompts"):
    """Three rows: with padding behind, with padding before, without; `kind` says what their labels hold."""
    ids = random_ids(3, length, seed=length)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    mask[1, :1] = 0
    labels = ids.clone()
    labels[:, : length // 3] = -100
    if kind == "conversations":
        labels[1, length // 2 : length // 2 + 2] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    if kind == "packed":
        first = torch.arange(length) < length // 2
        inputs["position_ids"] = torch.where(first, torch.arange(length), torch.arange(length) - length // 2)
        inputs["position_ids"] = inputs["position_ids"].expand(3, -1)
        inputs["labels"][:, length // 2 : length // 2 + 2] = -100
        del inputs["attention_mask"]
    return inputs


def compiled_forms(model, form, backend):
    if form == "PeftModel":
        return torch.compile(model, backend=backend)
    if form == "base":
        return torch.compile(model.base_model.model, backend=backend)
    model.compile(backend=backend)
    return model


def step(call, model, inputs):
    """A training step: its loss and all gradients."""
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def graphs():
    return counters["stats"]["unique_graphs"]


def broken_by():
    """The functions at which graphs end."""
    reasons = [reason for reason, count in counters["graph_break"].items() if count]
    named = {
        name for name in ("_open_scope", "_enter_part", "_leave_part", "_close_scope") for r in reasons if name in r
    }
    assert len(named) == len(reasons), reasons
    return named


def check_training(model, call, twin, kind="prompts", lengths=LENGTHS):
    """Steps of both give equal losses, gradients and statistics; returns how many graphs there were after each."""
    made = []
    for length in lengths:
        loss, gradients = step(call, model, batch(length, kind))
        of_twin, expected = step(twin, twin, batch(length, kind))
        torch.testing.assert_close(loss, of_twin, rtol=1e-5, atol=0)
        assert gradients.keys() == expected.keys()
        assert any("router" in name and gradient.any() for name, gradient in gradients.items())
        for name, gradient in gradients.items():
            spread = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * spread, msg=name)
        made.append(graphs())
    for layer, other in zip(layers(model).values(), layers(twin).values()):
        assert torch.equal(layer.mixlora_stats_usage["default"], other.mixlora_stats_usage["default"])
        moments, expected = (each.mixlora_stats_moments["default"].view(torch.float64) for each in (layer, other))
        torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("target_modules", [SOME_LAYERS, LINEAR_LAYERS])
def test_training_of_any_length_takes_two_graphs_twice(llama, target_modules):
    """Those of the first length, and those of all others; nothing else of a step makes new ones."""
    model = adapt(llama, target_modules).train()
    twin = copy.deepcopy(model)
    made = check_training(model, torch.compile(model, backend="eager"), twin)
    assert made == [GRAPHS, GRAPHS, 2 * GRAPHS, 2 * GRAPHS, 2 * GRAPHS]
    assert broken_by() == {"_open_scope", "_enter_part"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["PeftModel", "base", "compile()"])
def test_every_way_to_compile_trains_alike(llama, form):
    model = adapt(llama, balance_loss_weight=0.5).train()
    twin = copy.deepcopy(model)
    assert check_training(model, compiled_forms(model, form, "aot_eager"), twin, lengths=(12,)) == [GRAPHS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conversations", "packed"])
def test_rows_of_several_segments_train_alike(llama, kind):
    model = adapt(llama).train()
    twin = copy.deepcopy(model)
    made = check_training(model, torch.compile(model, backend="eager"), twin, kind, (12, 15, 9))
    assert made == [GRAPHS, 2 * GRAPHS, 2 * GRAPHS]


@pytest.mark.parametrize("form", [{}, {"router_scope": "instruction"}, {"router_input": "words"}], ids=str)
@pytest.mark.parametrize("kind", ["prompts", "conversations"])
def test_factors_of_the_same_number_train_alike(llama, form, kind):
    """Words end a graph more: where the embeddings are, which tell them."""
    model = adapt(llama, pairing="same", **form).train()
    twin = copy.deepcopy(model)
    made = check_training(model, torch.compile(model, backend="eager"), twin, kind, (12, 15, 9))
    graphs_of_form = GRAPHS + ("router_input" in form)
    assert made[1] == made[2] <= 2 * graphs_of_form


@pytest.mark.slow
def test_terms_of_balance_join_a_scaled_loss(llama):
    """Their gradients are scaled with the loss, as where nothing is compiled."""
    model = adapt(llama, balance_loss_weight=0.5).train()
    twin = copy.deepcopy(model)
    call = torch.compile(model, backend="aot_eager")
    for forward in (call, twin):
        (forward(**batch(12)).loss * 7).backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        if other.grad is not None:
            spread = float(other.grad.abs().max())
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5 * spread, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_is_equal(llama, reentrant):
    """Dynamo leaves what transformers checkpoints to eager mode, because layers note statistics in it."""
    model = adapt(llama, balance_loss_weight=0.5).train()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    made = check_training(model, torch.compile(model, backend="aot_eager"), twin, lengths=(12, 9, 15))
    assert made[1] == made[2] and graphs() <= 10


@pytest.mark.slow
def test_checkpoints_are_compiled_where_dynamo_is_allowed_to(llama):
    model = adapt(llama).train()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if not hasattr(torch._dynamo.config, option):
        pytest.skip(f"this torch has no {option}")
    with torch._dynamo.config.patch({option: True}):
        made = check_training(model, torch.compile(model, backend="aot_eager"), twin, lengths=(12, 9, 15))
    assert made == [3, 6, 6]  # the embeddings, whose output has to require a gradient, are a graph of their own


def test_autocast_training_has_the_same_loss(llama):
    model = adapt(llama).train()
    twin = copy.deepcopy(model)
    call = torch.compile(model, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), (of_twin, expected) = step(call, model, batch(12)), step(twin, twin, batch(12))
    torch.testing.assert_close(loss, of_twin, rtol=1e-3, atol=0)
    assert graphs() == GRAPHS
    for name, gradient in gradients.items():
        similarity = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99 or not expected[name].any(), name


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_takes_as_few_graphs(llama, without_gradients):
    model = adapt(llama).eval()
    call, made = torch.compile(model, backend="eager"), []
    for length in LENGTHS:
        inputs = batch(length)
        with without_gradients():
            expected, output = model(**inputs), call(**inputs)
        torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(output.loss, expected.loss, **CLOSE)
        made.append(graphs())
    assert made == [GRAPHS, GRAPHS, 2 * GRAPHS, 2 * GRAPHS, 2 * GRAPHS]
    assert broken_by() == {"_open_scope", "_enter_part"}


@pytest.mark.slow
def test_generation_with_a_growing_cache_gives_the_same_tokens(llama):
    model = adapt(llama).eval()
    compiled = copy.deepcopy(model)
    compiled.base_model.model.compile(backend="eager")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    made = []
    for length in (7, 8, 10):
        prompts = {"input_ids": random_ids(2, length, seed=length), "attention_mask": torch.ones(2, length).long()}
        prompts["attention_mask"][1, :2] = 0
        assert torch.equal(compiled.generate(**prompts, **options), model.generate(**prompts, **options))
        made.append(graphs())
    # Prompts and single tokens, of one length and of any: not as many as there are lengths of the cache.
    assert made[0] == 5 and made[2] <= 8


@pytest.mark.slow
def test_inductor_trains_alike(llama):
    """PyTorch's default backend, which needs a C++ compiler on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler: {error}")
    model = adapt(llama, balance_loss_weight=0.5).train()
    twin = copy.deepcopy(model)
    assert check_training(model, torch.compile(model), twin, lengths=(12,)) == [GRAPHS]
