"""Which positions decide a route, and which routes a generation keeps, in a whole Llama."""

import inspect
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import DynamicCache

from llava_mixlora import MixLoraError, known_prompt
from llava_mixlora.method import routing_scope
from llava_mixlora.method.forward_passes import attach, current_scope, is_attached, refine, use_scope
from llava_mixlora.method.model_inputs import IGNORE_INDEX, attended_positions
from llava_mixlora.method.routing_scope import RoutingScope

from ...tiny import layers, message_of, paper_form, random_ids, randomise

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PROMPTS = [random_ids(1, length, seed=length) for length in (3, 5, 8, 6, 4, 9, 7, 10)]


def adapt(model, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(model, paper_form(**options))).eval()


def routes(model):
    """The chosen factors of every layer as plain lists."""
    chosen = model.base_model.routes()
    assert len(chosen) == 14  # seven linear layers in each of two decoder layers
    return {name: (route.index_A.tolist(), route.index_B.tolist()) for name, route in chosen.items()}


def scores(model):
    return torch.stack([route.score_A for route in model.base_model.routes().values()])


def left_padded(prompts):
    length = max(prompt.shape[1] for prompt in prompts)
    rows = [nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts]
    masks = [nn.functional.pad(torch.ones_like(prompt), (length - prompt.shape[1], 0)) for prompt in prompts]
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}


def greedy(model, prompts, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    inputs = left_padded(prompts)
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


# --- which positions are averaged


def test_prompt_scope_never_sees_the_answer(llama):
    model = adapt(llama)
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, :6] = IGNORE_INDEX
    other = torch.where(labels == IGNORE_INDEX, ids, random_ids(2, 9, seed=9))
    assert not torch.equal(other, ids)
    model(input_ids=ids, labels=labels)
    expected = routes(model), scores(model)
    model(input_ids=other, labels=torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, other))
    assert routes(model) == expected[0]
    torch.testing.assert_close(scores(model), expected[1])


def test_sequence_scope_sees_the_answer(llama):
    model = adapt(llama, router_scope="sequence")
    ids, other = random_ids(1, 9), random_ids(1, 9)
    other[:, 5:] = random_ids(1, 4, seed=4)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, 5:] = 7
    model(input_ids=ids, labels=labels)
    before = scores(model)
    model(input_ids=other, labels=labels)
    assert not torch.allclose(scores(model), before, atol=1e-3)


def test_training_routes_as_inference_on_the_prompt_does(llama):
    model = adapt(llama)
    ids = random_ids(1, 9)
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    model(input_ids=ids, labels=labels)
    trained = routes(model)
    model(input_ids=ids[:, :5])
    assert routes(model) == trained


@pytest.mark.skipif(
    "logits_to_keep" not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters,
    reason="this transformers keeps all logits",
)
def test_labels_cut_to_the_logits_that_are_kept_route_as_whole_ones(llama):
    model = adapt(llama)
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, :6] = IGNORE_INDEX
    loss = model(input_ids=ids, labels=labels).loss
    expected = routes(model), scores(model)
    cut = model(input_ids=ids, labels=labels[:, -6:], logits_to_keep=6)
    assert (routes(model), cut.logits.shape[1]) == (expected[0], 6)
    torch.testing.assert_close((scores(model), cut.loss), (expected[1], loss))


def test_row_without_a_prompt_falls_back_to_what_is_attended(llama):
    model = adapt(llama)
    ids = random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask)
    expected = scores(model)
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE_INDEX))
    assert torch.equal(scores(model), expected)


class Prefixed(nn.Module):
    """A model that sees more positions than its labels have."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, inputs_embeds, labels=None):
        return SimpleNamespace(logits=self.proj(inputs_embeds), past_key_values=None)


def supervised(*masks):
    """Labels [B, 6] of which the first so many positions of each row are masked."""
    labels = random_ids(len(masks), 6)
    for row, masked in enumerate(masks):
        labels[row, :masked] = IGNORE_INDEX
    return labels


UNKNOWN_PROMPTS = {
    "labels taken away": (None, "labels were not passed along"),
    "everything supervised": (supervised(0, 0), "2 of 2 answers"),
    "all but the first position": (supervised(1, 1), "2 of 2 answers"),
    "one row without": (supervised(3, 0), "1 of 2 answers"),
    "labels of another shape": (supervised(3, 3)[:, :4], "not those of the sequence"),
}


@pytest.mark.parametrize("case", UNKNOWN_PROMPTS)
def test_training_without_a_prompt_is_told_once_or_refused(case):
    labels, why = UNKNOWN_PROMPTS[case]
    options = {"target_modules": ["proj"], "r": 2, "num_factors": 6}
    model, x = get_peft_model(Prefixed(), paper_form(**options)), torch.randn(2, 6, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            model(inputs_embeds=x, labels=labels)
    assert len(told) == 1
    message = str(told[0].message)
    assert why in message and "completion_only_loss" in message and "known_prompt" in message and "\n" not in message
    strict = get_peft_model(Prefixed(), paper_form(**options, unknown_prompt="error"))
    assert why in message_of(strict, inputs_embeds=x, labels=labels)
    assert current_scope() is None


@pytest.mark.parametrize("options", [{"router_scope": "sequence"}, {}, {"unknown_prompt": "error"}])
def test_nobody_is_told_of_a_prompt_that_is_known_or_not_asked_for(options):
    model = get_peft_model(Prefixed(), paper_form(target_modules=["proj"], r=2, num_factors=6, **options))
    x, prompt = torch.randn(2, 6, 4), torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs_embeds=x, labels=supervised(2, 4))
        with known_prompt(prompt=prompt):
            model(inputs_embeds=x)
        model.eval()
        model(inputs_embeds=x)
        if "router_scope" in options:
            model.train()(inputs_embeds=x)


@pytest.mark.parametrize("router_scope", ["prompt", "sequence"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_no_logits(llama, router_scope, side):
    model = adapt(llama, router_scope=router_scope)
    length = 12
    rows, masks, positions = [], [], []
    for prompt in PROMPTS[:4]:
        gap = length - prompt.shape[1]
        pad = (gap, 0) if side == "left" else (0, gap)
        rows.append(nn.functional.pad(prompt, pad, value=11))
        masks.append(nn.functional.pad(torch.ones_like(prompt), pad))
        positions.append((masks[-1].cumsum(1) - 1).clamp(min=0))
    together = model(
        input_ids=torch.cat(rows), attention_mask=torch.cat(masks), position_ids=torch.cat(positions)
    ).logits
    for row, mask, prompt in zip(together, masks, PROMPTS):
        torch.testing.assert_close(row[mask[0].bool()], model(input_ids=prompt).logits[0], **CLOSE)


def test_positional_arguments_open_the_scope_too(llama):
    model = adapt(llama)
    ids, mask = random_ids(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    model.base_model.model(ids, mask)
    positional = scores(model)
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(scores(model), positional)


def test_embeddings_open_the_scope_too(llama):
    model = adapt(llama)
    ids, mask = random_ids(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    model(input_ids=ids, attention_mask=mask)
    expected = scores(model)
    model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(scores(model), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_weights_are_the_mean_over_the_routed_positions(B, S, masked, labelled, count_padding, seed):
    generator = torch.Generator().manual_seed(seed)
    attended = torch.randint(0, 2, (B, S), generator=generator).bool() if masked else None
    prompt = torch.randint(0, 2, (B, S), generator=generator).bool() if labelled else None
    scope = RoutingScope((B, S), attended, prompt)
    for router_scope in ("prompt", "sequence"):
        weights = scope.weights(router_scope, count_padding)
        for b in range(B):
            everywhere = list(range(S))
            not_padding = everywhere if attended is None else attended[b].nonzero().flatten().tolist()
            routed = everywhere if count_padding else not_padding
            if router_scope == "prompt" and prompt is not None:
                routed = [s for s in routed if prompt[b, s]]
            routed = routed or not_padding or everywhere
            row = torch.full((S,), 1 / S) if weights is None else weights[b]
            expected = torch.zeros(S).index_fill(0, torch.tensor(routed), 1 / len(routed))
            torch.testing.assert_close(row, expected)


def test_scope_covers_only_its_own_sequence():
    scope = RoutingScope((2, 5))
    assert scope.covers(torch.zeros(2, 5, 3))
    assert not scope.covers(torch.zeros(2, 4, 3))
    assert not scope.covers(torch.zeros(10, 3))
    assert not RoutingScope().covers(torch.zeros(2, 5, 3))


def test_refine_outside_of_any_forward_does_nothing():
    refine(None, None, torch.zeros(1, 2, 3))
    assert current_scope() is None


# --- gradient checkpointing


CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


def training_batch(seed, padded):
    ids = random_ids(3, 8, seed=seed)
    labels = ids.clone()
    labels[:, : 3 + seed] = IGNORE_INDEX
    mask = torch.ones_like(ids)
    mask[0, 8 - padded :] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, IGNORE_INDEX), "attention_mask": mask}


def gradients(model, checkpointing, backward, decode_routing="prefill"):
    model = adapt(model, decode_routing=decode_routing).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    losses = [model(**training_batch(seed, padded)).loss for seed, padded in ((1, 3), (2, 0))]
    backward(sum(losses))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_another_thread(loss):
    failure = []

    def run():
        try:
            loss.backward()
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


@pytest.mark.parametrize("backward", [torch.Tensor.backward, in_another_thread], ids=["same", "other thread"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("decode_routing", ["prefill", "step"])
def test_checkpointing_changes_no_gradient_of_two_forwards(
    _llama, llama, copy_of, checkpointing, backward, decode_routing
):
    expected = gradients(copy_of(_llama), None, torch.Tensor.backward, decode_routing)
    actual = gradients(llama, checkpointing, backward, decode_routing)
    assert actual.keys() == expected.keys() and len(expected) == 14 * 5
    for name, gradient in expected.items():
        assert gradient is not None and actual[name] is not None, name
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "router" in name)


# --- the life of a scope and of its hooks


def test_failing_forward_leaves_no_scope_behind(llama):
    model = adapt(llama)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    assert current_scope() is None
    assert model(input_ids=random_ids(1, 3)).logits.isfinite().all()


def test_refused_inputs_close_no_scope_but_their_own(llama):
    model, outer = adapt(llama), RoutingScope((1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a hook that fails after a refusal
        for scope in (None, outer):
            with use_scope(scope):
                message_of(model, input_ids=random_ids(1, 6), position_ids=torch.arange(4)[None])
                assert current_scope() is scope


def test_interrupted_forward_leaves_no_scope_behind(llama):
    model = adapt(llama)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.base_model.model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=random_ids(1, 3))
    handle.remove()
    model(input_ids=random_ids(1, 3))
    assert current_scope() is None


def test_failing_generation_leaves_no_held_routes_behind(llama):
    model = adapt(llama)
    expected = greedy(model, PROMPTS[:1])
    with pytest.raises(IndexError):
        model.generate(input_ids=torch.full((1, 3), 10_000), max_new_tokens=2)
    assert torch.equal(greedy(model, PROMPTS[:1]), expected)


def test_nested_model_closes_its_own_scope_only(llama):
    model = adapt(llama)
    seen = {}

    def look(name):
        return lambda *_: seen.__setitem__(name, current_scope())

    model.base_model.model.model.embed_tokens.register_forward_hook(look("outer before"))
    inner = nn.Sequential(nn.Linear(2, 2))
    attach(inner)
    inner[0].register_forward_hook(look("inner"))

    def call_inner(*_):
        inner(torch.zeros(1, 2))

    model.base_model.model.model.norm.register_forward_hook(call_inner)
    model.base_model.model.lm_head.register_forward_hook(look("outer after"))
    model(input_ids=random_ids(1, 3))
    assert seen["inner"] is not seen["outer before"]
    assert seen["outer after"] is seen["outer before"]
    assert current_scope() is None


def test_attaching_twice_is_attaching_once(llama):
    attach(llama)
    attach(llama)
    assert len(llama._forward_pre_hooks) == len(llama._forward_hooks) == 1


def test_unload_leaves_nothing_behind(llama):
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    hooks = [name for name in (*hooks, "_forward_hooks_always_called")]
    ids = random_ids(1, 4)
    expected = llama(input_ids=ids).logits
    base = adapt(llama).unload().eval()
    assert base is llama and not layers(base) and not is_attached(base)
    assert all(not getattr(module, name) for module in base.modules() for name in hooks)
    assert "generate" not in vars(base)
    assert torch.equal(base(input_ids=ids).logits, expected)


def test_own_hooks_of_the_model_survive_unload(llama):
    calls = []
    llama.register_forward_hook(lambda *_: calls.append(1))
    base = adapt(llama).unload()
    base(input_ids=random_ids(1, 3))
    assert calls == [1]


# --- generation


@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs", "random"])
def test_cached_uncached_and_batched_generation_agree(llama, routing):
    model = adapt(llama, routing=routing)
    alone = [greedy(model, [prompt]) for prompt in PROMPTS]
    assert len({tuple(answer[0].tolist()) for answer in alone}) > 4
    assert torch.equal(greedy(model, PROMPTS), torch.cat(alone))
    assert torch.equal(greedy(model, PROMPTS, use_cache=False), torch.cat(alone))


def test_adapted_head_sees_the_last_position_and_keeps_its_route(llama):
    """In generation transformers computes the head for the last position only."""
    model = adapt(llama, target_modules=["q_proj", "lm_head"])
    alone = torch.cat([greedy(model, [prompt]) for prompt in PROMPTS])
    assert torch.equal(greedy(model, PROMPTS, use_cache=False), alone)
    assert torch.equal(greedy(model, PROMPTS), alone)


def test_beams_are_the_same_cached_and_uncached(llama):
    model = adapt(llama)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    cached = greedy(model, PROMPTS[:3], **options)
    assert torch.equal(greedy(model, PROMPTS[:3], use_cache=False, **options), cached)
    alone = [greedy(model, [prompt], **options) for prompt in PROMPTS[:3]]
    assert torch.equal(torch.cat(alone), cached)


def test_sampling_is_the_same_cached_and_uncached(llama):
    model = adapt(llama)
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(5)
    cached = greedy(model, PROMPTS[:3], **options)
    torch.manual_seed(5)
    assert torch.equal(greedy(model, PROMPTS[:3], use_cache=False, **options), cached)


def test_manual_decoding_with_a_cache_equals_generate(llama):
    model = adapt(llama)
    inputs = left_padded(PROMPTS[:3])
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens, cache, step = [], DynamicCache(), inputs["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            output = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache)
            cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(step)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            positions = positions[:, -1:] + 1
    assert torch.equal(torch.cat(tokens, 1), greedy(model, PROMPTS[:3]))


def test_manual_decoding_lets_the_model_make_the_cache(llama):
    model = adapt(llama)
    with torch.no_grad():
        output = model(input_ids=PROMPTS[2], use_cache=True)
        tokens = [output.logits[:, -1:].argmax(-1)]
        for _ in range(7):
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values)
            tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), greedy(model, PROMPTS[2:3]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cache_of_a_fixed_length_gives_the_same_tokens(llama, attention):
    """For which transformers makes a mask of queries and keys out of the padding."""
    if not hasattr(transformers, "StaticCache"):
        pytest.skip("transformers 4.37 has no such cache")
    llama.config._attn_implementation = attention
    model = adapt(llama)
    for prompts in (PROMPTS[:3], PROMPTS[3:6]):
        assert torch.equal(greedy(model, prompts, cache_implementation="static"), greedy(model, prompts))


def test_compiled_generation_gives_the_same_tokens(llama):
    """What transformers does on a GPU with a cache of a fixed length, where it captures CUDA graphs too."""
    try:
        from transformers.generation import CompileConfig
    except ImportError:
        pytest.skip("transformers 4.37 does not compile generation")
    compiled = CompileConfig(backend="aot_eager", mode=None)
    compiled._compile_all_devices = True  # transformers leaves the CPU out
    options = {"cache_implementation": "static", "compile_config": compiled}
    model = adapt(llama)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for prompts in (PROMPTS[:3], PROMPTS[3:6]):  # the second generation takes the graph of the first, and other routes
        assert torch.equal(greedy(model, prompts, **options), greedy(model, prompts))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("begin, opened", [(0, False), (0, True), (2, False)])
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=3), st.integers(0, 3))
def test_mask_of_queries_and_keys_tells_what_is_padding(dtype, begin, opened, real, spare):
    """`begin` keys were there before, `spare` are still unused; `opened`: no query is left without a key."""
    real = torch.tensor(real)
    keys = nn.functional.pad(real, (begin, spare), value=True)
    attends = torch.ones(5, begin + 5 + spare, dtype=torch.bool).tril(begin) & keys[:, None, :]
    if opened:
        attends |= ~attends.any(dim=-1, keepdim=True)
    mask = attends if dtype == torch.bool else torch.zeros(attends.shape).masked_fill(~attends, -1e30)
    cache = DynamicCache()
    if begin:
        cache.update(torch.zeros(len(real), 1, begin, 4), torch.zeros(len(real), 1, begin, 4), 0)
    assert torch.equal(attended_positions(mask[:, None], (len(real), 5), cache), real)


def test_injected_adapter_generates_the_same_cached(_llama, llama, copy_of):
    config = paper_form(r=2, num_factors=6, lora_alpha=8)
    injected = randomise(inject_adapter_in_model(config, copy_of(_llama))).eval()
    assert torch.equal(greedy(injected, PROMPTS[:2]), greedy(adapt(llama), PROMPTS[:2]))


def test_prefill_keeps_the_prompts_routes_and_step_does_not(_llama, llama, copy_of):
    answers = {}
    for decode_routing, base in (("prefill", llama), ("step", copy_of(_llama))):
        model = adapt(base, decode_routing=decode_routing)
        model(input_ids=PROMPTS[2])
        on_the_prompt = routes(model)
        answers[decode_routing] = greedy(model, PROMPTS[2:3])
        assert (routes(model) == on_the_prompt) == (decode_routing == "prefill")
    assert not torch.equal(answers["prefill"], answers["step"])


def test_next_generation_routes_anew(llama):
    model = adapt(llama)
    expected = [greedy(model, [prompt]) for prompt in PROMPTS[:3]]
    assert [greedy(model, [prompt]).tolist() for prompt in PROMPTS[:3]] == [answer.tolist() for answer in expected]
    chosen = []
    for prompt in PROMPTS[:3]:
        greedy(model, [prompt])
        chosen.append(routes(model))
    assert chosen[0] != chosen[1]


changes_in_place = pytest.mark.skipif(
    not hasattr(DynamicCache, "batch_select_indices"), reason="caches of this transformers do not change in place"
)


@changes_in_place
def test_generation_that_changes_its_batch_is_refused(llama):
    model = adapt(llama)
    with torch.no_grad():
        cache = model(input_ids=random_ids(3, 4), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(MixLoraError, match="3 instances goes on with 2"):
            model(input_ids=random_ids(2, 1), past_key_values=cache)
    assert current_scope() is None


@changes_in_place
def test_cache_of_fewer_instances_is_refused_in_one_line(llama):
    model = adapt(llama)
    cache = model(input_ids=random_ids(1, 4), use_cache=True).past_key_values
    message = message_of(model, input_ids=random_ids(2, 1), past_key_values=cache)
    assert "1 instances goes on with 2" in message


@changes_in_place
def test_repeated_cache_repeats_its_routes(llama):
    model = adapt(llama)
    following = random_ids(2, 1, seed=3)
    with torch.no_grad():
        expected = []
        for row in range(2):
            cache = model(input_ids=PROMPTS[2], use_cache=True).past_key_values
            expected.append(model(input_ids=following[row : row + 1], past_key_values=cache).logits)
        cache = model(input_ids=PROMPTS[2], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        actual = model(input_ids=following, past_key_values=cache).logits
    torch.testing.assert_close(actual, torch.cat(expected), **CLOSE)


def test_disabled_adapter_generates_as_the_base(_llama, llama):
    model = adapt(llama)
    with model.disable_adapter():
        assert torch.equal(greedy(model, PROMPTS[:2]), greedy(_llama, PROMPTS[:2]))
    assert not torch.equal(greedy(model, PROMPTS[:2]), greedy(_llama, PROMPTS[:2]))


def test_threads_that_share_a_model_do_not_see_each_other(llama):
    model = adapt(llama)
    expected = [greedy(model, [prompt], max_new_tokens=12).tolist() for prompt in PROMPTS]
    barrier = threading.Barrier(len(PROMPTS))

    def answer(prompt):
        barrier.wait()
        return greedy(model, [prompt], max_new_tokens=12).tolist()

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(2):
            assert list(pool.map(answer, PROMPTS)) == expected


class Recurrent(nn.Module):
    """A model whose cache is a plain tuple, to which no routes can be tied."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, inputs_embeds, past_key_values=None):
        return SimpleNamespace(logits=self.proj(inputs_embeds), past_key_values=(inputs_embeds,))


def test_cache_of_an_unknown_kind_is_no_error():
    model = get_peft_model(Recurrent(), paper_form(target_modules=["proj"]))
    output = model(inputs_embeds=torch.randn(2, 3, 4))
    model(inputs_embeds=torch.randn(2, 1, 4), past_key_values=output.past_key_values)
    assert current_scope() is None


# --- layers that are given the same tensor


def test_layers_with_the_same_input_share_its_average(llama, monkeypatch):
    model, counted = adapt(llama), []
    pooled_input = routing_scope.pooled_input

    def count(x, weights):
        counted.append(x)
        return pooled_input(x, weights)

    monkeypatch.setattr(routing_scope, "pooled_input", count)
    expected = model(input_ids=PROMPTS[2]).logits
    assert len(counted) == 2 * 4  # q, k and v; o; gate and up; down
    monkeypatch.setattr(routing_scope, "weakref", SimpleNamespace(ref=lambda x: lambda: None))  # nobody is recognised
    assert torch.equal(model(input_ids=PROMPTS[2]).logits, expected)
    assert len(counted) == 2 * 4 + 14


@pytest.mark.parametrize("inference", [False, True])
def test_average_of_a_tensor_that_has_changed_is_made_anew(inference):
    scope = RoutingScope((1, 3), attended=torch.tensor([[True, True, False]]))
    with torch.inference_mode(inference):
        x = torch.randn(1, 3, 4)
        for options in [("prompt", False), ("prompt", True), ("sequence", False)]:
            positions = 3 if options[1] else 2
            torch.testing.assert_close(scope.pooled(x, *options, given=x), x[:, :positions].mean(dim=1))
        x.add_(1)
        for each in (x, x * 2):
            torch.testing.assert_close(scope.pooled(each, *options, given=each), each[:, :2].mean(dim=1))


def test_average_that_was_made_without_a_graph_is_not_taken_for_training():
    scope, x = RoutingScope((1, 3)), torch.randn(1, 3, 4, requires_grad=True)
    with torch.no_grad():
        scope.pooled(x, "prompt", False, given=x)
    assert scope.pooled(x, "prompt", False, given=x).requires_grad
    assert not scope.pooled(x.detach(), "prompt", False, given=x).requires_grad
