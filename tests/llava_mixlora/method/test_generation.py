"""A generation is routed by the prompt that it was given, however it is filled, and goes on with its cache's routes."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llava_mixlora import known_prompt

from ...conftest import LLAMA
from ...tiny import VOCABULARY, message_of, paper_form, random_ids, randomise

PROMPT = random_ids(1, 9, seed=7)
PROMPTS = [random_ids(1, length, seed=length) for length in (3, 5, 8, 6)]
NEW_TOKENS = 8
newer = pytest.mark.skipif(not hasattr(transformers, "StaticCache"), reason="transformers 4.37 has no such feature")
CONFIG = {"r": 2, "num_factors": 6, "lora_alpha": 8}


def adapt(model, seed=0, **options):
    return randomise(get_peft_model(model, paper_form(**{**CONFIG, "task_type": "CAUSAL_LM", **options})), seed).eval()


@pytest.fixture
def model(llama):
    return adapt(llama)


@pytest.fixture
def two_adapters(llama):
    """Adapters "default" and "other", which also have heads of their own."""
    config = paper_form(**CONFIG, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(llama, config)
    model.add_adapter("other", copy.deepcopy(config))
    heads = model.get_base_model().lm_head.modules_to_save
    for name in ("default", "other"):
        heads[name].weight.data.add_(torch.randn_like(heads[name].weight) * 0.3)
    return randomise(model).eval()


def greedy(model, ids, **options):
    """What is generated behind `ids`, for beams and continuations of them in a row."""
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, **{**defaults, **options})[:, ids.shape[1] :]


def routed_by(model, ids, length, new_tokens=NEW_TOKENS, **inputs):
    """The same without `generate` or a cache, and routed by the first `length` positions alone."""
    begin = ids.shape[1]
    for _ in range(new_tokens):
        labels = ids.clone()
        labels[:, :length] = -100
        labels = labels if ids.shape[1] > length else None
        with torch.no_grad():
            step = model(input_ids=ids, labels=labels, use_cache=False, **inputs).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    return ids[:, begin:]


def filled_cache(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def left_padded(prompts, length=None):
    length = length or max(prompt.shape[1] for prompt in prompts)
    rows = [nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts]
    masks = [nn.functional.pad(torch.ones_like(prompt), (length - prompt.shape[1], 0)) for prompt in prompts]
    return torch.cat(rows), torch.cat(masks)


@contextmanager
def lengths_of_forwards(model):
    """The lengths of the sequences that a model's forward passes get."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    handle.remove()


# --- caches that are given


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def itself(cache):
    return cache


@newer
@pytest.mark.parametrize("handed_on", [itself, copy.copy, copy.deepcopy, through_pickle])
def test_generation_goes_on_with_the_routes_of_a_given_cache(model, handed_on):
    for suffix in (3, 1):
        ids = torch.cat([PROMPT[:, :6], random_ids(1, suffix, seed=3)], dim=1)
        cache = filled_cache(model, ids[:, :6])
        assert torch.equal(greedy(model, ids, past_key_values=handed_on(cache)), routed_by(model, ids, 6))


@newer
def test_copies_of_a_prefix_serve_several_prompts(model):
    """The prefix caching that transformers documents."""
    prefix = filled_cache(model, PROMPT[:, :5])
    answers = []
    for seed in range(3):
        ids = torch.cat([PROMPT[:, :5], random_ids(1, 4, seed=seed)], dim=1)
        answers.append(greedy(model, ids, past_key_values=copy.deepcopy(prefix)))
        assert torch.equal(answers[-1], routed_by(model, ids, 5))
        greedy(model, PROMPTS[seed])  # another generation in between
    assert len({tuple(answer[0].tolist()) for answer in answers}) > 1


@newer
def test_second_turn_keeps_the_routes_of_the_first(model):
    options = {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = model.generate(input_ids=PROMPT, pad_token_id=0, **options)
    ids = torch.cat([first.sequences, random_ids(1, 5, seed=2)], dim=1)
    assert torch.equal(greedy(model, ids, past_key_values=first.past_key_values), routed_by(model, ids, 9))


@newer
def test_beams_go_on_with_the_routes_of_a_given_cache(model):
    options = {"num_beams": 3, "num_return_sequences": 2}
    ids = random_ids(2, 8)
    cached = greedy(model, ids, past_key_values=filled_beams(model, ids[:, :6], 3), **options)
    known = torch.arange(8).expand(2, 8) < 6
    with known_prompt(prompt=known):
        assert torch.equal(greedy(model, ids, use_cache=False, **options), cached)


def filled_beams(model, ids, beams):
    cache = filled_cache(model, ids)
    cache.batch_repeat_interleave(beams)
    return cache


@newer
def test_cropped_cache_keeps_its_routes(model):
    cache = filled_cache(model, PROMPT[:, :6])
    with torch.no_grad():
        model(input_ids=PROMPT[:, 6:], past_key_values=cache)
    cache.crop(6 - cache.get_seq_length())
    assert cache.get_seq_length() == 6
    ids = torch.cat([PROMPT[:, :6], random_ids(1, 4, seed=4)], dim=1)
    assert torch.equal(greedy(model, ids, past_key_values=cache), routed_by(model, ids, 6))


@newer
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_cache_that_was_emptied_is_routed_anew(model, kind):
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    for prompt in PROMPTS:
        if kind == "static" or cache.get_seq_length():
            cache.reset() if kind == "static" else cache.crop(-cache.get_seq_length())
        assert torch.equal(greedy(model, prompt, past_key_values=cache), routed_by(model, prompt, prompt.shape[1]))


@newer
@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded"])
def test_implementations_of_caches_agree(model, implementation):
    if implementation == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloads from a GPU only")
    ids, mask = left_padded(PROMPTS)
    expected = torch.cat([routed_by(model, prompt, prompt.shape[1]) for prompt in PROMPTS])
    for _ in range(2):  # the second takes the static cache of the first
        answers = greedy(model, ids, attention_mask=mask, cache_implementation=implementation)
        assert torch.equal(answers, expected)


@newer
def test_cache_of_another_batch_size_is_refused_in_one_line(model):
    cache = filled_cache(model, random_ids(3, 6))
    message = message_of(greedy, model, random_ids(2, 7), past_key_values=cache)
    assert "3 instances goes on with 2" in message


@newer
def test_cache_that_was_filled_without_the_adapter_is_refused_in_one_line(model):
    with model.disable_adapter():
        cache = filled_cache(model, PROMPT[:, :6])
    assert "filled without adapter 'default'" in message_of(greedy, model, PROMPT, past_key_values=cache)


@newer
def test_cache_of_another_adapter_is_refused_in_one_line(two_adapters):
    cache = filled_cache(two_adapters, PROMPT[:, :6])
    two_adapters.set_adapter("other")
    assert "filled without adapter 'other'" in message_of(greedy, two_adapters, PROMPT, past_key_values=cache)


@newer
def test_cache_without_the_adapter_goes_on_where_each_step_is_routed(llama):
    model = adapt(llama, decode_routing="step")
    with model.disable_adapter():
        cache = filled_cache(model, PROMPT[:, :6])
    assert greedy(model, PROMPT, past_key_values=cache).shape == (1, NEW_TOKENS)


# --- prompts in chunks


@newer
@pytest.mark.parametrize("told", ["argument", "config", "positional config", "model's config"])
def test_prompt_in_chunks_is_one_prompt(model, told):
    expected = routed_by(model, PROMPT, 9)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    chunked = GenerationConfig(**options, prefill_chunk_size=4)
    if told == "argument":
        answer = model.generate(input_ids=PROMPT, prefill_chunk_size=4, **options)
    elif told == "config":
        answer = model.generate(input_ids=PROMPT, generation_config=chunked)
    elif told == "positional config":
        answer = model.generate(PROMPT, chunked)
    else:
        model.get_base_model().generation_config.prefill_chunk_size = 4
        answer = model.generate(input_ids=PROMPT, **options)
        assert model.get_base_model().generation_config.prefill_chunk_size == 4
    assert torch.equal(answer[:, 9:], expected)
    assert chunked.prefill_chunk_size == 4


# --- drafts


def smaller_llama():
    torch.manual_seed(4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**LLAMA, "num_hidden_layers": 1})).eval()


@newer
@pytest.mark.parametrize("assistant", ["smaller", "adapted", "the model", "the PEFT model", "lookup", "early exit"])
def test_drafts_change_no_answer(model, assistant, _llama, copy_of):
    ids = torch.cat([PROMPT, PROMPT], dim=1)  # something to look up
    expected = routed_by(model, ids, 18, 16)
    unused = min(set(range(3, VOCABULARY)) - {*ids[0].tolist(), *expected[0].tolist()})
    options = {
        "smaller": lambda: {"assistant_model": smaller_llama()},
        "adapted": lambda: {"assistant_model": adapt(copy_of(_llama), seed=1).get_base_model()},
        "the model": lambda: {"assistant_model": model.get_base_model()},
        "the PEFT model": lambda: {"assistant_model": model},
        "lookup": lambda: {"prompt_lookup_num_tokens": 3, "eos_token_id": unused},  # transformers 4.57 asks for one
        "early exit": lambda: {"assistant_early_exit": 1},
    }[assistant]()
    with lengths_of_forwards(model.get_base_model()) as lengths:
        assert torch.equal(greedy(model, ids, max_new_tokens=16, **options), expected)
    assert any(length > 18 for length in lengths)  # the first forward pass has drafts already
    assert torch.equal(greedy(model, ids, max_new_tokens=16), expected)


@newer
def test_assistant_that_is_the_model_drafts_what_it_answers(model):
    assistant = copy.deepcopy(model.get_base_model())
    drafting = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    assistant.generation_config.update(**drafting, assistant_confidence_threshold=0.0)
    with lengths_of_forwards(model.get_base_model()) as lengths:
        greedy(model, PROMPT, max_new_tokens=16, assistant_model=assistant)
    assert len(lengths) <= 4  # as all drafts are right; with other routes few would be


# --- whichever object generates


def test_generation_does_not_depend_on_the_object(model, llama_folder, tmp_path):
    expected = routed_by(model, PROMPT, 9)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(llama_folder)
    loaded.load_adapter(str(tmp_path))
    for each in (model, model.base_model, model.base_model.model, loaded.eval()):
        for options in ({}, {"use_cache": False}, {"num_beams": 1, "num_return_sequences": 1}):
            assert torch.equal(greedy(each, PROMPT, **options), expected)


def saved_and_loaded(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, saved_and_loaded])
def test_copy_of_a_model_generates_by_itself(model, copied):
    expected = routed_by(model, PROMPT, 9)
    other = copied(model)
    randomise(model, seed=5)  # which the copy does not feel
    for options in ({}, {"use_cache": False}):
        assert torch.equal(greedy(other, PROMPT, **options), expected)
        assert not torch.equal(greedy(model, PROMPT, **options), expected)
    base = other.base_model.unload() if hasattr(other.base_model, "unload") else other.unload()
    assert "generate" not in vars(base)


def test_generation_of_an_instance_is_wrapped_and_comes_back(llama):
    """transformers puts the `custom_generate` of a model's repository there."""
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(llama).generate(llama, *args, **kwargs)

    llama.generate = own
    model = adapt(llama)
    assert torch.equal(greedy(model, PROMPT, use_cache=False), routed_by(model, PROMPT, 9))
    assert len(calls) == 1
    assert model.unload().generate is own


# --- adapters by instance


def alone(model, name, ids, **options):
    if name == "__base__":
        with model.disable_adapter():
            return greedy(model, ids, **options)
    model.set_adapter(name)
    return greedy(model, ids, **options)


@pytest.mark.parametrize("told", ["arguments", "config", "model's config"])
@pytest.mark.parametrize("repeats", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_named_adapters_have_beams_of_any_origin(two_adapters, told, repeats):
    ids, names = random_ids(3, 6), ["default", "other", "__base__"]
    two_adapters.get_base_model().generation_config.eos_token_id = None
    expected = torch.cat([alone(two_adapters, name, row[None], **repeats) for name, row in zip(names, ids)])
    two_adapters.set_adapter("default")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if told == "arguments":
        options.update(repeats)
    elif told == "config":
        options = {"generation_config": GenerationConfig(**options, **repeats)}
    else:
        for name, value in repeats.items():
            setattr(two_adapters.get_base_model().generation_config, name, value)
    answers = two_adapters.generate(input_ids=ids, adapter_names=names, **options)[:, 6:]
    assert torch.equal(answers, expected)


@pytest.mark.parametrize("names", [["default"] * 2, ["other"] * 4])
def test_wrong_number_of_adapter_names_is_refused_in_one_line(two_adapters, names):
    message = message_of(greedy, two_adapters, random_ids(3, 5), adapter_names=names)
    assert f"but got {len(names)} and 3" in message


def number_of_hooks(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_threads_name_adapters_at_the_same_time(two_adapters):
    jobs = [["default", "other"], ["other", "__base__"], ["other", "default"], None]
    batches = [random_ids(2, 5, seed=seed) for seed in range(len(jobs))]
    expected = [
        torch.cat([alone(two_adapters, name, row[None]) for name, row in zip(names or ["default"] * 2, ids)])
        for names, ids in zip(jobs, batches)
    ]
    assert len({answer.numpy().tobytes() for answer in expected}) == len(jobs)
    two_adapters.set_adapter("default")
    before, during = number_of_hooks(two_adapters), set()
    barrier = threading.Barrier(len(jobs))

    def answer(number):
        barrier.wait()
        options = {} if jobs[number] is None else {"adapter_names": jobs[number]}
        answers = []
        for _ in range(10):
            answers.append(greedy(two_adapters, batches[number], **options))
            during.add(number_of_hooks(two_adapters))
        return answers

    with ThreadPoolExecutor(len(jobs)) as pool:
        for number, answers in enumerate(pool.map(answer, range(len(jobs)))):
            assert all(torch.equal(each, expected[number]) for each in answers), jobs[number]
    assert during == {before} and number_of_hooks(two_adapters) == before


# --- a decoder without its head


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("embedded", [False, True])
def test_decoder_without_its_head_ignores_padding(model, side, embedded):
    decoder = model.base_model.model.model
    rows, masks = [], []
    for prompt in PROMPTS:
        gap = (8 - prompt.shape[1], 0) if side == "left" else (0, 8 - prompt.shape[1])
        rows.append(nn.functional.pad(prompt, gap, value=11))
        masks.append(nn.functional.pad(torch.ones_like(prompt), gap))
    ids, mask = torch.cat(rows), torch.cat(masks)

    def hidden(ids, **inputs):
        inputs.update({"inputs_embeds": decoder.embed_tokens(ids)} if embedded else {"input_ids": ids})
        return decoder(**inputs).last_hidden_state

    with torch.no_grad():
        together = hidden(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for row, attended, prompt in zip(together, mask, PROMPTS):
            torch.testing.assert_close(row[attended.bool()], hidden(prompt)[0], atol=1e-4, rtol=1e-4)


def test_decoder_without_its_head_goes_on_with_its_cache(model):
    decoder = model.base_model.model.model
    with torch.no_grad():
        cache = decoder(input_ids=PROMPT[:, :6], use_cache=True).past_key_values
        cached = decoder(input_ids=PROMPT[:, 6:], past_key_values=cache).last_hidden_state
        labels = PROMPT.clone()
        labels[:, :6] = -100
        whole = model(input_ids=PROMPT, labels=labels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(cached, whole[:, 6:], atol=1e-4, rtol=1e-4)


# --- guidance


@pytest.mark.parametrize("length", [1, 4, 9, 10, 12])
def test_guidance_is_routed_by_its_own_prompt(model, length):
    """The unconditional forward passes have a cache, or none, beside that of the generation."""
    negative = random_ids(1, length, seed=9)
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    expected = []
    for _ in range(NEW_TOKENS):
        logits = []
        for prompt in (PROMPT, negative):
            ids = torch.cat([prompt, *expected], dim=1)
            labels = torch.full_like(ids, -100)
            labels[:, prompt.shape[1] :] = ids[:, prompt.shape[1] :]
            labels = labels if expected and prompt.shape[1] > 1 else None
            known = None
            if expected and prompt.shape[1] == 1:
                known = torch.arange(ids.shape[1])[None] < 1
            with known_prompt(prompt=known) if known is not None else nullcontext(), torch.no_grad():
                logits.append(model(input_ids=ids, labels=labels, use_cache=False).logits[:, -1].log_softmax(-1))
        given, unconditional = logits
        expected.append((unconditional + 1.5 * (given - unconditional)).argmax(-1, keepdim=True))
    expected = torch.cat(expected, dim=1)
    assert torch.equal(greedy(model, PROMPT, **guided), expected)
    assert torch.equal(greedy(model, PROMPT, use_cache=False, **guided), expected)


# --- known prompts


def variants(model, ids, **options):
    """The same generation with a cache, without one, and with beams that lead to the same answer."""
    for more in ({}, {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}):
        yield more, greedy(model, ids, **options, **more)


def test_known_prompt_is_what_is_averaged(model):
    prompt = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    captured = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with known_prompt(prompt=prompt):
        answer = greedy(model, PROMPT)
        assert torch.equal(greedy(model, PROMPT, use_cache=False), answer)
    handle.remove()
    x = captured[0][0]
    assert x.shape[0] == 9
    expected = layer.route_of(x[prompt[0]].mean(dim=0, keepdim=True), "default")
    actual = model.base_model.routes()["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(actual.score_A, expected.score_A)
    assert torch.equal(actual.index_A, expected.index_A) and torch.equal(actual.index_B, expected.index_B)
    assert not torch.equal(answer, greedy(model, PROMPT))


def test_known_prompt_of_padded_rows_is_that_of_each_alone(model):
    ids, mask = left_padded(PROMPTS[1:], 8)
    known = torch.zeros(3, 8, dtype=torch.bool)
    known[:, -4:-1] = True
    rows = []
    for prompt in PROMPTS[1:]:
        with known_prompt(prompt=known[:1, -prompt.shape[1] :]):
            rows.append(greedy(model, prompt))
    with known_prompt(prompt=known):
        for options, answers in variants(model, ids, attention_mask=mask):
            if "num_beams" not in options:
                assert torch.equal(answers, torch.cat(rows))


def test_turns_of_a_conversation_are_routed_as_when_they_were_answered(model):
    answers = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]] * 2, dtype=torch.bool)
    ids = random_ids(2, 12, seed=8)
    with known_prompt(answers=answers):
        cached = greedy(model, ids)
        assert torch.equal(greedy(model, ids, use_cache=False), cached)
        beams = {"num_beams": 2, "num_return_sequences": 2}
        assert torch.equal(greedy(model, ids, **beams), greedy(model, ids, use_cache=False, **beams))
    # As in training, where the labels tell of the answers.
    after = torch.cat([ids, cached], dim=1)
    labels = torch.where(nn.functional.pad(answers, (0, NEW_TOKENS), value=True), after, -100)
    with torch.no_grad():
        predicted = model(input_ids=after, labels=labels).logits.argmax(-1)
    assert torch.equal(predicted[:, 11:-1], cached)
    assert not torch.equal(greedy(model, ids), cached)


def test_conversation_with_several_turns_has_a_cache_to_go_on_with(model):
    answers = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    ids = random_ids(1, 8, seed=8)
    with known_prompt(answers=answers):
        expected = greedy(model, ids)
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=True)
    tokens = [output.logits[:, -1:].argmax(-1)]
    with torch.no_grad():
        for _ in range(NEW_TOKENS - 1):
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values)
            tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)


BAD_MASKS = {
    "nothing": ({}, "told nothing"),
    "empty row": ({"prompt": [[True, False], [False, False]]}, "row 1 has no position"),
    "overlap": ({"prompt": [[True, True]], "answers": [[False, True]]}, r"both True at (0, 1)"),
    "two shapes": ({"prompt": [[True, True]], "answers": [[False, False, True]]}, "expected the same"),
    "no batch": ({"prompt": [True, False]}, "expected a mask [B, S]"),
    "numbers": ({"answers": [[0, 1, 2]]}, "expected a mask [B, S]"),
    "fractions": ({"answers": [[0.5, 1.0]]}, "expected a mask [B, S]"),
}


@pytest.mark.parametrize("masks, said", BAD_MASKS.values(), ids=BAD_MASKS)
def test_known_prompt_that_is_none_is_refused_in_one_line(masks, said):
    def enter():
        with known_prompt(**masks):
            pass

    assert said in message_of(enter)


@pytest.mark.parametrize("rows, length", [(1, 10), (1, 12), (2, 9)])
def test_known_prompt_of_another_shape_is_refused_in_one_line(model, rows, length):
    with known_prompt(prompt=torch.ones(rows, length, dtype=torch.bool)):
        assert "expected one value for each position" in message_of(greedy, model, PROMPT)
    assert torch.equal(greedy(model, PROMPT), routed_by(model, PROMPT, 9))  # nothing of it is left


def test_known_prompt_of_nothing_but_padding_is_refused_in_one_line(model):
    ids, mask = left_padded(PROMPTS[:2], 8)
    with known_prompt(prompt=mask == 0):
        assert "no position but padding" in message_of(greedy, model, ids, attention_mask=mask)


# --- encoders with a decoder

SIZES = {"vocab_size": VOCABULARY, "d_model": 32}
TOKENS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}


def t5():
    config = T5Config(
        **SIZES, **TOKENS, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=8.0, dropout_rate=0.0
    )
    return T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"]


def bart():
    ends = {"bos_token_id": 1, "forced_eos_token_id": None}
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = BartConfig(**SIZES, **TOKENS, **ends, **sizes, **heads, init_std=0.3, dropout=0.0)
    return BartForConditionalGeneration(config), ["q_proj", "v_proj", "fc1", "fc2"]


@pytest.fixture(params=[t5, bart])
def translator(request):
    torch.manual_seed(6)
    base, targets = request.param()
    return adapt(base, task_type="SEQ_2_SEQ_LM", target_modules=targets)


def right_padded(prompts):
    length = max(prompt.shape[1] for prompt in prompts)
    gaps = [(0, length - prompt.shape[1]) for prompt in prompts]
    rows = [nn.functional.pad(prompt, gap, value=7) for prompt, gap in zip(prompts, gaps)]
    masks = [nn.functional.pad(torch.ones_like(prompt), gap) for prompt, gap in zip(prompts, gaps)]
    return torch.cat(rows), torch.cat(masks)


def translated(model, ids, **options):
    defaults = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 1}
    return model.generate(input_ids=ids, **{**defaults, **options})[:, 1:]


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_decoder_of_an_encoder_generates_the_same_cached_uncached_and_padded(translator, beams):
    expected = torch.cat([translated(translator, prompt, **beams) for prompt in PROMPTS])
    assert len({tuple(answer.tolist()) for answer in expected}) > 1
    ids, mask = right_padded(PROMPTS)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(translated(translator, ids, attention_mask=mask, **beams, **options), expected)


def test_decoder_of_an_encoder_trains_under_the_routes_of_generation(translator):
    ids, mask = right_padded(PROMPTS)
    translated(translator, ids, attention_mask=mask)
    generated = translator.base_model.routes()
    labels = random_ids(4, 5, seed=1)
    labels[1, 3:] = -100
    translator.train()(input_ids=ids, attention_mask=mask, labels=labels)
    trained = translator.base_model.routes()
    assert any("decoder" in name for name in trained) and any("encoder" in name for name in trained)
    for name, route in trained.items():
        torch.testing.assert_close(route.score_A, generated[name].score_A, msg=name, atol=1e-4, rtol=1e-4)
        assert torch.equal(route.index_B, generated[name].index_B), name


def test_decoder_of_an_encoder_answers_as_it_was_trained_to(translator):
    """Fed its own answer as labels it predicts that answer."""
    ids, mask = right_padded(PROMPTS)
    answer = translated(translator, ids, attention_mask=mask).contiguous()
    with torch.no_grad():
        logits = translator(input_ids=ids, attention_mask=mask, labels=answer).logits
    assert torch.equal(logits.argmax(-1), answer)
