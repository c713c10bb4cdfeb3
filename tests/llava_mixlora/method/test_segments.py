"""Rows with several routes: packed samples and the turns of a conversation."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import get_peft_model
from torch import nn

from llava_mixlora import known_prompt
from llava_mixlora.method.model_inputs import IGNORE_INDEX
from llava_mixlora.method.segments import Segments, conversation_turns, routed_positions
from llava_mixlora.method.static_core import instance_grams

from ...tiny import layers, paper_form, random_ids, randomise

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
each_example = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

pieces = st.lists(st.integers(1, 5), min_size=1, max_size=4)
turns = st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=3)  # question, answer
conversations = st.lists(turns, min_size=1, max_size=3)


def adapt(model, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(model, paper_form(**options))).eval()


@pytest.fixture
def model(llama):
    return adapt(llama)


def routes(model):
    """The chosen factors of every layer, one row for each segment."""
    chosen = model.base_model.routes()
    return {name: (route.index_A.tolist(), route.index_B.tolist()) for name, route in chosen.items()}


def conversation(spoken, seed):
    """Token ids and labels [1, S] of a conversation, and where its answers begin."""
    ids = random_ids(1, sum(question + answer for question, answer in spoken), seed=seed)
    labels, begins, place = torch.full_like(ids, IGNORE_INDEX), [], 0
    for question, answer in spoken:
        begins.append(place + question)
        labels[:, begins[-1] : begins[-1] + answer] = ids[:, begins[-1] : begins[-1] + answer]
        place += question + answer
    return ids, labels, begins


def padded(rows, value=0):
    return nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True, padding_value=value)


def packed(samples):
    """One row of several samples as TRL and transformers pack them."""
    lengths = [ids.shape[1] for ids, _, _ in samples]
    labels = torch.cat([labels for _, labels, _ in samples], dim=1)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # transformers keeps samples apart by position_ids where there is no cache to fill.
    inputs = {"input_ids": torch.cat([ids for ids, _, _ in samples], dim=1), "labels": labels, "use_cache": False}
    return inputs, places, ends


# --- the division itself


@each_example
@given(st.lists(pieces, min_size=1, max_size=3), st.booleans(), st.integers(0, 2**16))
def test_every_position_meets_the_core_of_its_segment(rows, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    S = max(map(sum, rows)) + 140  # more than one chunk
    lengths = [torch.tensor([*row[:-1], S - sum(row[:-1])]) for row in rows]
    index = torch.stack([torch.arange(len(each)).repeat_interleave(each) for each in lengths])
    segments = Segments(index)
    G, E = sum(map(len, rows)), 3
    assert len(segments) == G and segments.most == max(map(len, rows))
    z = torch.randn(len(rows), S, E, generator=generator)
    cores = torch.randn(G, E, E, generator=generator)
    attended = torch.rand(len(rows), S, generator=generator) < 0.6 if masked else None
    owner = index + torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1, None]
    torch.testing.assert_close(segments.apply(z, cores), torch.einsum("bse,bsef->bsf", z, cores[owner]))
    counted = torch.ones_like(index, dtype=torch.bool) if attended is None else attended
    split, kept = segments.split(z), segments.attended(attended)
    for g in range(G):
        mine = z[(owner == g) & counted]
        torch.testing.assert_close(segments.grams(z, attended)[g], mine.t() @ mine)
        assert torch.equal(split[g][kept[g]], mine)
    torch.testing.assert_close(instance_grams(split, kept), segments.grams(z, attended))
    assert segments.last.tolist() == torch.tensor([*map(len, rows)]).cumsum(0).sub(1).tolist()
    assert torch.equal(segments.row, torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([*map(len, rows)])))


def test_segments_follow_a_layer_to_its_device():
    """A model may lie on several; the device without storage stands for another one here."""
    segments, elsewhere = Segments(torch.tensor([[0, 0, 1], [0, 1, 1]])), torch.device("meta")
    moved = segments.on(elsewhere)
    assert moved is segments.on(elsewhere) and segments.on(segments.real.device) is segments
    z, cores = torch.zeros(2, 3, 5, device=elsewhere), torch.zeros(4, 5, 5, device=elsewhere)
    assert moved.apply(z, cores).shape == z.shape
    assert moved.grams(z, None).shape == cores.shape
    assert moved.of_rows(torch.zeros(2, 2, 7, device=elsewhere)).shape == (4, 7)


def test_turns_begin_behind_answers_and_average_all_before_their_own():
    answered = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1, 0]]).bool()
    attended = torch.tensor([[1] * 7 + [0], [0] + [1] * 7]).bool()
    none = torch.zeros_like(answered).long()
    index = conversation_turns(answered, attended, none)
    assert index.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]  # nothing is answered in the rest
    assert conversation_turns(answered, attended, none, rest_is_asked=True).tolist() == [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 1, 2],
    ]
    routed = routed_positions(index, answered, attended, none)
    assert routed.int().tolist() == [
        [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
        [[0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]],
    ]


def test_samples_of_a_row_know_nothing_of_each_other():
    answered = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0, 1]]).bool()
    samples = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    attended = torch.ones_like(answered)
    index = conversation_turns(answered, attended, samples)
    assert index.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    assert routed_positions(index, answered, attended, samples).int().tolist() == [
        [[1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0]]
    ]


# --- conversations


@each_example
@given(conversations, st.sampled_from(["left", "right"]), st.integers(0, 1000))
def test_every_answer_is_what_a_fresh_prompt_with_the_history_gives(model, spoken, side, seed):
    """A fresh prompt says which part of it was answered, as labels do in training."""
    rows = [conversation(each, seed + number) for number, each in enumerate(spoken)]
    S = max(ids.shape[1] for ids, _, _ in rows)

    def pad(row, value):
        gap = S - row.shape[1]
        return nn.functional.pad(row, (gap, 0) if side == "left" else (0, gap), value=value)

    mask = torch.cat([pad(torch.ones_like(ids), 0) for ids, _, _ in rows])
    together = model(
        input_ids=torch.cat([pad(ids, 11) for ids, _, _ in rows]),
        labels=torch.cat([pad(labels, IGNORE_INDEX) for _, labels, _ in rows]),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    for row, (ids, labels, begins) in enumerate(rows):
        gap = S - ids.shape[1] if side == "left" else 0
        for begin in begins:
            with known_prompt(answers=labels[:, :begin] != IGNORE_INDEX):
                fresh = model(input_ids=ids[:, :begin]).logits
            torch.testing.assert_close(together[row, gap : gap + begin], fresh[0], **CLOSE)


@each_example
@given(turns, st.integers(0, 1000))
def test_generation_goes_on_from_a_history_as_training_saw_it(model, spoken, seed):
    ids, labels, begins = conversation(spoken, seed)
    prompt, answers = ids[:, : begins[-1]], labels[:, : begins[-1]] != IGNORE_INDEX
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with known_prompt(answers=answers):
        cached = model.generate(input_ids=prompt, **options)
        assert torch.equal(model.generate(input_ids=prompt, use_cache=False, **options), cached)
    answered = torch.cat([labels[:, : begins[-1]], cached[:, begins[-1] :]], dim=1)
    scores = model(input_ids=cached, labels=answered).logits[:, begins[-1] - 1 : -1]
    assert torch.equal(scores.argmax(dim=-1), cached[:, begins[-1] :])


@each_example
@given(turns, st.integers(0, 1000), st.data())
def test_nothing_but_what_precedes_an_answer_decides_its_route(model, spoken, seed, data):
    ids, labels, begins = conversation(spoken, seed)
    turn = data.draw(st.integers(0, len(begins) - 1))
    other = ids.clone()
    other[:, begins[turn] :] = random_ids(1, ids.shape[1] - begins[turn], seed=seed + 1)
    model(input_ids=ids, labels=labels)
    expected = routes(model)
    model(input_ids=other, labels=torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, other))
    for name, (chosen_A, chosen_B) in routes(model).items():
        assert len(chosen_A) == len(begins)  # one route for each answer
        assert (chosen_A[: turn + 1], chosen_B[: turn + 1]) == tuple(c[: turn + 1] for c in expected[name])


def test_question_of_a_turn_decides_its_route(model):
    ids, labels, begins = conversation([(3, 2), (4, 2)], seed=0)
    model(input_ids=ids, labels=labels)
    expected = routes(model)
    ids[:, 5:9] = random_ids(1, 4, seed=9)
    model(input_ids=ids, labels=labels)
    assert all(now[0][0] == expected[name][0][0] for name, now in routes(model).items())
    assert any(now[0][1] != expected[name][0][1] for name, now in routes(model).items())


# --- packing


WAYS_TO_TELL = ("position_ids", "lengths", "numbers", "blocks", "additive blocks")
OPTIONS = ({}, {"router_scope": "sequence"}, {"lora_dropout": 0.5}, {"balance_loss_weight": 0.1})


mixes_packed_samples = pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.46"), reason="attention of this transformers mixes packed samples"
)


@mixes_packed_samples
@each_example
@given(conversations, st.sampled_from(WAYS_TO_TELL), st.integers(0, 99))
def test_packed_samples_are_what_padded_ones_are(model, spoken, told_by, seed):
    samples = [conversation(each, seed + number) for number, each in enumerate(spoken)]
    rows, marks = padded([ids for ids, _, _ in samples]), padded([torch.ones_like(ids) for ids, _, _ in samples])
    apart = model(
        input_ids=rows, labels=padded([labels for _, labels, _ in samples], IGNORE_INDEX), attention_mask=marks
    )
    expected, expected_routes = apart.logits[marks.bool()], routes(model)
    inputs, places, ends = packed(samples)
    sample = torch.repeat_interleave(torch.arange(len(samples)), ends.diff())
    blocks = (sample[:, None] == sample[None]).tril()[None, None]
    told = {
        "position_ids": {},
        "lengths": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "attention_mask": blocks},
        "numbers": {"seq_idx": sample[None].int(), "attention_mask": blocks},
        "blocks": {"attention_mask": blocks},
        "additive blocks": {"attention_mask": torch.zeros(blocks.shape).masked_fill(~blocks, -1e30)},
    }[told_by]
    together = model(**inputs, position_ids=places, **told)
    torch.testing.assert_close(together.logits[0], expected, **CLOSE)
    assert routes(model) == expected_routes


@mixes_packed_samples
@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_training_is_padded_training(_llama, copy_of, routing, checkpointing, options):
    """Loss, gradients, counts and moments; with dropout only what it leaves to compare."""
    samples = [conversation(spoken, seed) for seed, spoken in enumerate([[(3, 2)], [(2, 3), (4, 1)], [(5, 2)]])]
    found = []
    for together in (False, True):
        model = adapt(copy_of(_llama), routing=routing, **options).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if together:
            inputs, places, _ = packed(samples)
            inputs["position_ids"] = places
        else:
            inputs = {
                "input_ids": padded([ids for ids, _, _ in samples]),
                "labels": padded([labels for _, labels, _ in samples], IGNORE_INDEX),
                "attention_mask": padded([torch.ones_like(ids) for ids, _, _ in samples]),
            }
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), model))
    (loss, padded_model), (packed_loss, packed_model) = found
    usage = [[layer.mixlora_stats_usage["default"] for layer in layers(model).values()] for _, model in found]
    if "lora_dropout" in options:
        assert all(torch.equal(counts.sum(dim=1), other.sum(dim=1)) for counts, other in zip(*usage))
        return
    torch.testing.assert_close(packed_loss, loss)
    for (name, wanted), (_, actual) in zip(padded_model.named_parameters(), packed_model.named_parameters()):
        if wanted.requires_grad:
            torch.testing.assert_close(actual.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert all(torch.equal(*counts) for counts in zip(*usage))
    moments = [[layer.moments("default") for layer in layers(model).values()] for _, model in found]
    for wanted, actual in zip(*moments):
        torch.testing.assert_close(actual, wanted, **CLOSE)
