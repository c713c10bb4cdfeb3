"""What a model's inputs tell of padding and of samples packed into a row, in every form in which they tell it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from llava_mixlora.method.model_inputs import (
    CUMULATIVE_LENGTHS,
    answered_positions,
    attended_positions,
    sample_starts,
)

from ...tiny import message_of

each_example = settings(max_examples=60, deadline=None)
rows_of_samples = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)


def packed(rows, padding):
    """Numbers from 1 of the samples of each row, 0 at what fills a row up, [B, S]."""
    length = max(map(sum, rows)) + padding
    numbers = [[number for number, n in enumerate(row, 1) for _ in range(n)] for row in rows]
    return torch.tensor([row + [0] * (length - len(row)) for row in numbers])


def expected_starts(numbers):
    before = numbers.roll(1, dims=1)
    before[:, 0] = numbers[:, 0]
    return (numbers != before) & (numbers != 0)


def own_positions(numbers):
    """Position ids that begin at 0 in every sample; padding goes on counting."""
    places = torch.arange(numbers.shape[1]).expand_as(numbers)
    begins = (expected_starts(numbers) * places).cummax(dim=1).values
    return places - begins


def block_mask(numbers):
    """What attends to what, bool [B, 1, S, S]: samples to themselves, padding to nothing."""
    same = (numbers.unsqueeze(2) == numbers.unsqueeze(1)) & (numbers != 0).unsqueeze(1)
    return same.tril().unsqueeze(1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def has_lonely_neighbours(rows):
    """Whether a sample of one position follows another, whose zeros are taken for padding."""
    return any(pair == (1, 1) for row in rows for pair in zip(row, row[1:]))


def starts_of(shape, **inputs):
    attended = attended_positions(inputs.get("attention_mask"), shape)
    return sample_starts(inputs, shape, attended)


def told_in_every_way(numbers):
    attended, positions = (numbers != 0).long(), own_positions(numbers)
    yield "position_ids", {"position_ids": positions, "attention_mask": attended}
    yield (
        "position_ids of several kinds",
        {"position_ids": positions + torch.zeros(4, 1, 1), "attention_mask": attended},
    )
    yield "position_ids, padding at 0", {"position_ids": positions * attended, "attention_mask": attended}
    yield "numbers", {"attention_mask": numbers}
    yield "seq_idx", {"seq_idx": numbers, "attention_mask": attended}
    yield "blocks", {"attention_mask": block_mask(numbers)}
    yield "additive blocks", {"attention_mask": additive(block_mask(numbers))}
    yield "blocks by kind of attention", {"attention_mask": {"full_attention": block_mask(numbers)}}


@each_example
@given(rows_of_samples, st.integers(0, 3))
def test_packing_is_the_same_however_it_is_told(rows, padding):
    numbers = packed(rows, padding)
    expected = expected_starts(numbers)
    for name, inputs in told_in_every_way(numbers):
        if name == "position_ids of several kinds" and any(1 in row[:-1] for row in rows):
            continue  # the place of an image stands still, so a second 0 is none that begins a sample
        if "position_ids" in inputs and has_lonely_neighbours(rows):
            continue
        starts = starts_of(tuple(numbers.shape), **inputs)
        found = torch.zeros_like(expected) if starts is None else starts
        assert torch.equal(found, expected), name


@each_example
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from(CUMULATIVE_LENGTHS), st.booleans())
def test_cumulative_lengths_tell_the_same(row, name, agree_with_positions):
    numbers = packed([row], 0)
    lengths = torch.tensor([0, *row]).cumsum(0).int()
    agree_with_positions &= not has_lonely_neighbours([row])
    inputs = {name: lengths, **({"position_ids": own_positions(numbers)} if agree_with_positions else {})}
    starts = starts_of(tuple(numbers.shape), **inputs)
    assert torch.equal(expected_starts(numbers), torch.zeros_like(numbers).bool() if starts is None else starts)


@each_example
@given(rows_of_samples)
def test_all_that_agrees_may_be_told_at_once(rows):
    length = max(map(sum, rows))
    rows = [[*row[:-1], row[-1] + length - sum(row)] for row in rows]  # without padding, which lengths cannot leave out
    assume(not has_lonely_neighbours(rows))
    numbers = packed(rows, 0)
    lengths = torch.tensor([0, *[n for row in rows for n in row]]).cumsum(0)
    told = {"position_ids": own_positions(numbers), "attention_mask": block_mask(numbers), "cu_seq_lens_q": lengths}
    starts = starts_of(tuple(numbers.shape), **told, cu_seq_lens_k=lengths)
    assert torch.equal(expected_starts(numbers), torch.zeros_like(numbers).bool() if starts is None else starts)


@each_example
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.booleans(), st.sampled_from([-1, 0, 1, "on"]))
def test_padding_is_no_packing(lengths, left, position_of_padding):
    S = max(lengths) + 1
    filled = [[0] * (S - n) + [1] * n if left else [1] * n + [0] * (S - n) for n in lengths]
    mask = torch.tensor(filled)
    counted = mask.cumsum(dim=1) - 1
    ids = counted if position_of_padding == "on" else counted.masked_fill(mask == 0, position_of_padding)
    square = (mask.bool().unsqueeze(1) & torch.ones(S, S).bool().tril()).unsqueeze(1)
    square &= mask.bool()[:, None, :, None]
    for inputs in (
        {"attention_mask": mask},
        {"attention_mask": mask.bool()},
        {"attention_mask": mask, "position_ids": ids},
        {"attention_mask": square},
        {"attention_mask": additive(square), "position_ids": ids},
        # What some attention kernels need: padding attends to everything rather than to nothing.
        {"attention_mask": square | ~square.any(dim=-1, keepdim=True)},
    ):
        attended = attended_positions(inputs["attention_mask"], tuple(mask.shape))
        assert torch.equal(attended[:, :-1], mask[:, :-1].bool())  # the last position may attend to everything
        starts = sample_starts(inputs, tuple(mask.shape), attended)
        assert starts is None or not starts.any()


@each_example
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(0, 9))
def test_positions_that_never_fall_are_one_sample(steps, begin):
    ids = torch.tensor(steps).clamp(min=1).cumsum(dim=1) + begin
    assert starts_of(tuple(ids.shape), position_ids=ids) is None
    standing_still = torch.tensor(steps).cumsum(dim=1) + begin  # the first of an image's places
    assert starts_of(tuple(ids.shape), position_ids=standing_still.expand(3, *ids.shape)) is None


def test_sliding_window_is_no_packing():
    places = torch.arange(8)
    near = ((places[:, None] >= places) & (places[:, None] - places < 3)).expand(2, 1, 8, 8)
    assert starts_of((2, 8), attention_mask=near) is None
    assert starts_of((2, 8), attention_mask={"sliding_attention": additive(near)}) is None


def test_prefix_that_attends_both_ways_is_no_packing():
    mask = torch.ones(6, 6).bool().tril()
    mask[:3, :3] = True
    mask = mask.expand(2, 1, 6, 6)
    assert starts_of((2, 6), attention_mask=mask) is None
    assert attended_positions(mask, (2, 6)).all()


def test_mask_of_a_cache_tells_the_padding_of_this_forward_pass():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    expected = torch.tensor([[True, True, False]])
    assert torch.equal(attended_positions(torch.tensor([[0, 1, 1, 1, 0]]), (1, 3), cache), expected)
    square = torch.ones(3, 8).bool().tril(2) & torch.tensor([0, 1, 1, 1, 0, 0, 0, 0]).bool()
    square[2] = False
    assert torch.equal(attended_positions(square.view(1, 1, 3, 8), (1, 3), cache), expected)


@pytest.mark.parametrize("mask", [None, "none", torch.ones(2, 3), {}])
def test_what_tells_nothing_of_the_sequence_is_left_alone(mask):
    assert attended_positions(mask, (2, 8)) is None
    assert starts_of((2, 8), attention_mask=mask) is None


# --- one line for what cannot be right

TWO = packed([[3, 5]], 0)
OTHER = packed([[4, 4]], 0)
SHAPE = tuple(TWO.shape)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 8])}, "cu_seq_lens_q"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens"),
        ({"attention_mask": OTHER}, "attention_mask"),
        ({"attention_mask": block_mask(OTHER)}, "attention_mask"),
        ({"attention_mask": additive(block_mask(OTHER))}, "attention_mask"),
        ({"seq_idx": OTHER - 1}, "seq_idx"),
    ],
)
def test_divisions_that_contradict_each_other_name_both_and_where(other, named):
    message = message_of(starts_of, SHAPE, position_ids=own_positions(TWO), **other)
    assert message.startswith(f"position_ids and {named} divide a packed row differently, at (0, 3) and at (0, 4)")


@pytest.mark.parametrize("shape", [(1, 7), (2, 8), (3, 1, 7), (3, 2, 8)])
def test_position_ids_of_another_sequence_are_refused(shape):
    message = message_of(starts_of, SHAPE, position_ids=torch.zeros(shape).long())
    assert f"position_ids of shape {shape} for a sequence of 1 x 8 positions" in message


@pytest.mark.parametrize("as_told", [lambda mask: mask, additive])
def test_blocks_that_attend_to_each_other_are_refused(as_told):
    mask = block_mask(TWO)
    mask[0, 0, 5, 1] = True
    message = message_of(starts_of, SHAPE, attention_mask=as_told(mask))
    assert "row 0" in message and "cannot be told apart" in message and "position_ids" in message


@pytest.mark.parametrize("name", CUMULATIVE_LENGTHS)
@pytest.mark.parametrize("ends", [[0], [1, 8], [0, 5, 3, 8], [0, 9], []])
def test_lengths_that_are_no_division_are_refused(name, ends):
    message = message_of(starts_of, SHAPE, **{name: torch.tensor(ends, dtype=torch.int32)})
    assert message == f"{name}={ends}: expected lengths summed up from 0 to the 8 positions of the sequence"


LABELS = torch.tensor([[-100, -100, 5, 6, -100, -100, 7, 8, -100], [-100, -100, -100, 5, 6, 7, -100, -100, 9]])
"""Two answers in each row."""


@pytest.mark.parametrize("as_indices", [False, True])
def test_answers_are_found_in_labels_that_were_cut_to_the_logits_that_are_kept(as_indices):
    shape, kept = tuple(LABELS.shape), 8
    given = torch.arange(1, 9) if as_indices else kept
    assert torch.equal(answered_positions(LABELS[:, -kept:], given, shape), LABELS != -100)
    assert torch.equal(answered_positions(LABELS, None, shape), LABELS != -100)


@pytest.mark.parametrize("row", [0, 1])
def test_answers_are_found_where_a_mask_keeps_what_predicts_a_label(row):
    labels = LABELS[row : row + 1]
    answered = labels != -100
    keeps = torch.cat((answered[0, 1:], torch.tensor([True])))  # the last one predicts nothing
    cut = torch.cat((torch.tensor([[-100]]), labels[answered][None]), dim=1)
    assert torch.equal(answered_positions(cut, keeps, tuple(labels.shape)), answered)


@pytest.mark.parametrize("kept", [None, 0, 9, 7, True, torch.arange(6), torch.tensor([8, 1, 2, 3, 4, 5, 6, 7]), "all"])
def test_labels_of_another_length_tell_nothing_of_answers(kept):
    assert answered_positions(LABELS[:, -8:], kept, tuple(LABELS.shape)) is None
    assert answered_positions(None, kept, tuple(LABELS.shape)) is None
