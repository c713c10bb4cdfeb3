"""The factors of tasks, and the loss that asks routers for them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mixlora import MixLoraError
from llava_mixlora.method.task_subsets import task_loss, task_subsets

pytestmark = pytest.mark.one_stack

SOME_OF_16 = [[2, 4, 10, 15], [1, 7, 11, 14], [3, 6, 9, 12], [0, 5, 8, 13], [0, 3, 4, 7]]
SOME_OF_6 = [[0, 4], [1, 2], [3, 5]]


def largest_overlap(subsets):
    rows = [set(row) for row in subsets.tolist()]
    return max(len(row & other) for place, row in enumerate(rows) for other in rows[:place])


@st.composite
def sizes(draw):
    num_factors = draw(st.integers(1, 20))
    r = draw(st.integers(1, num_factors))
    return draw(st.integers(1, min(30, math.comb(num_factors, r)))), num_factors, r


@settings(deadline=None)
@given(sizes())
def test_every_task_has_r_factors_of_its_own_in_order(size):
    tasks, num_factors, r = size
    subsets = task_subsets(tasks, num_factors, r)
    assert subsets.shape == (tasks, r) and subsets.dtype == torch.int64
    assert subsets.min() >= 0 and subsets.max() < num_factors
    assert (subsets.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in subsets.tolist()}) == tasks


@settings(deadline=None)
@given(sizes(), st.data())
def test_tasks_keep_their_factors_when_others_are_added(size, data):
    tasks, num_factors, r = size
    fewer = data.draw(st.integers(0, tasks))
    assert torch.equal(task_subsets(fewer, num_factors, r), task_subsets(tasks, num_factors, r)[:fewer])


def test_factors_are_the_same_on_every_machine():
    """An adapter that goes on training elsewhere finds the factors that it has learnt with."""
    assert task_subsets(5, 16, 4).tolist() == SOME_OF_16
    assert task_subsets(3, 6, 2).tolist() == SOME_OF_6


def test_global_seeds_and_devices_do_not_matter():
    drawn = task_subsets(9, 20, 3)
    torch.manual_seed(7)
    with torch.device("meta"):  # under which transformers makes models
        assert torch.equal(task_subsets(9, 20, 3), drawn)


@pytest.mark.parametrize(
    "tasks, num_factors, r, most",
    [(4, 16, 4, 0), (8, 64, 8, 0), (16, 16, 4, 2), (40, 32, 4, 2), (100, 64, 8, 3), (15, 6, 2, 1)],
)
def test_tasks_share_few_factors(tasks, num_factors, r, most):
    assert largest_overlap(task_subsets(tasks, num_factors, r)) <= most


def test_no_factor_is_left_out():
    used = task_subsets(30, 16, 4).flatten().bincount(minlength=16)
    assert used.max() - used.min() <= 2


def test_every_subset_can_be_had():
    assert len(task_subsets(math.comb(9, 4), 9, 4)) == 126


@pytest.mark.parametrize("tasks, num_factors, r", [(7, 4, 2), (2, 4, 4), (127, 9, 4)])
def test_too_many_tasks_are_refused_in_one_line(tasks, num_factors, r):
    with pytest.raises(MixLoraError, match=f"{tasks} tasks.*at most {math.comb(num_factors, r)}") as error:
        task_subsets(tasks, num_factors, r)
    assert "\n" not in str(error.value) and "raise num_factors" in str(error.value)


def test_loss_is_minus_the_mean_log_probability_of_the_tasks_factors():
    score = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]])
    subset = torch.tensor([[0, 1], [1, 3]])
    expected = -(math.log(0.5) + math.log(0.25) + math.log(0.2) + math.log(0.4)) / 4
    loss = task_loss(score, subset)
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert loss.shape == () and loss.dtype == torch.float32


def test_loss_is_least_where_the_tasks_factors_share_all_probability():
    even = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.25, 0.25]])
    subset = torch.tensor([[1, 2, 4, 5]])
    torch.testing.assert_close(task_loss(even, subset), torch.tensor(math.log(4)))
    for _ in range(20):
        assert task_loss(torch.rand(1, 6).softmax(-1), subset) > math.log(4)


def test_router_learns_the_tasks_factors():
    logits = torch.randn(3, 8).requires_grad_()
    subset = task_subsets(3, 8, 2)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        task_loss(logits.softmax(-1), subset).backward()
        optimizer.step()
    assert torch.equal(logits.topk(2).indices.sort().values, subset)


@pytest.mark.parametrize("distance", [50.0, 80.0, 100.0, 1e4])
def test_probabilities_that_vanish_keep_loss_and_gradients_finite(distance):
    logits = torch.zeros(2, 6)
    logits[:, 0] = distance
    logits.requires_grad_()
    loss = task_loss(logits.softmax(-1), torch.tensor([[1, 2], [0, 5]]))
    (loss * 65536).backward()  # as a scaler of float16 gradients does
    assert loss.isfinite() and loss > 20
    assert logits.grad.isfinite().all()


def test_gradient_of_a_small_probability_is_that_of_the_logarithm():
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    subset = torch.tensor([[1, 2]])
    gradients = []
    for loss_of in (
        lambda x: task_loss(x.softmax(-1), subset),
        lambda x: -x.log_softmax(-1).gather(-1, subset).mean(),
    ):
        leaf = logits.clone().requires_grad_()
        loss_of(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_half_precision_is_computed_in_float32():
    score = torch.tensor([[0.9, 0.1]], dtype=torch.bfloat16)
    loss = task_loss(score, torch.tensor([[1]]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -score.float()[0, 1].log())
