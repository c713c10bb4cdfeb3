"""The estimator of task interference on gradients whose interference is known."""

import math

import pytest
import torch

from llava_mixlora.analysis.interference_estimate import ESTIMATORS, MEAN_OF_RATIOS, batch_gains, estimate

pytestmark = pytest.mark.one_stack

d = 64


def gram(gradients):
    """`gradients` [T, K, d]."""
    return torch.einsum("ibd,jcd->ibjc", gradients, gradients)


def noisy(directions, batches, noise, seed=0):
    """Gradients of tasks whose mean is known, each batch with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.as_tensor(directions, dtype=torch.float64)
    means = torch.nn.functional.pad(directions, (0, d - directions.shape[1])).unsqueeze(1)
    return means + noise * torch.randn(len(directions), batches, d, generator=generator, dtype=torch.float64)


def by_loops(gradients, estimator):
    """The definition, sample by sample."""
    T, K = gradients.shape[:2]

    def change(i, b, j):
        others = [gradients[j, c] for c in range(K) if (i, b) != (j, c)]
        return sum(float(gradients[i, b] @ other / other.norm()) for other in others) / len(others)

    def entry(i, j):
        theirs, own = ([change(i, b, task) for b in range(K)] for task in (j, i))
        if estimator == MEAN_OF_RATIOS:
            return sum(t / o for t, o in zip(theirs, own)) / K
        return sum(theirs) / sum(own)

    return torch.tensor([[entry(i, j) for j in range(T)] for i in range(T)], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opposed_orthogonal_and_equal_tasks(estimator):
    """The length of a task's own gradients changes nothing: steps are normalised, and gains are relative to its own."""
    tasks = noisy([[1, 0], [-3, 0], [0, 2], [5, 0]], batches=4, noise=0)
    found = estimate(gram(tasks), estimator)
    expected = [[1, -1, 0, 1], [-1, 1, 0, -1], [0, 0, 1, 0], [1, -1, 0, 1]]
    assert torch.allclose(found.interference, torch.tensor(expected, dtype=torch.float64))
    assert found.measurable.all() and torch.all(found.error < 1e-9)
    assert found.halves_correlation == pytest.approx(1)
    assert torch.allclose(found.gains[1], torch.tensor([-3, 3, 0, -3], dtype=torch.float64))


def test_steps_on_all_others_add_up():
    found = estimate(gram(noisy([[1, 0], [-3, 0], [0, 2], [5, 0]], batches=4, noise=0)))
    assert torch.allclose(found.from_others, torch.tensor([0, -2, 0, 0], dtype=torch.float64))
    assert found.mean_from_others == pytest.approx(-0.5) and found.mean_from_others_error < 1e-9


def test_sums_are_of_measurable_tasks_alone():
    tasks = noisy([[3, 0], [-3, 0], [0, 0]], batches=8, noise=0.3)
    found = estimate(gram(tasks))
    assert found.from_others.isnan().tolist() == [False, False, True] == found.from_others_error.isnan().tolist()
    assert found.mean_from_others == pytest.approx(found.from_others[:2].mean().item())
    assert math.isnan(estimate(gram(0 * tasks)).mean_from_others)


def test_standard_error_of_sums_is_the_spread_of_repeated_measurements():
    directions = [[2, 0], [1, 1], [-1, 1]]
    found = [estimate(gram(noisy(directions, batches=8, noise=0.3, seed=seed))) for seed in range(200)]
    sums, errors = (torch.stack([getattr(one, name) for one in found]) for name in ("from_others", "from_others_error"))
    assert torch.allclose(sums.std(dim=0), errors.square().mean(dim=0).sqrt(), rtol=0.25)
    means = torch.tensor([[one.mean_from_others, one.mean_from_others_error] for one in found], dtype=torch.float64)
    assert means[:, 0].std().item() == pytest.approx(means[:, 1].square().mean().sqrt().item(), rel=0.25)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batches", [3, 6])
def test_estimators_are_those_of_the_definition(estimator, batches):
    tasks = noisy([[4, 0, 0], [3, 2, 0], [-2, 0, 3]], batches, noise=0.3)
    assert torch.allclose(estimate(gram(tasks), estimator).interference, by_loops(tasks, estimator))


def test_step_on_a_batch_does_not_count_for_the_batch_itself():
    """Each batch has a direction of its own, on which only itself would gain; shared is what is opposed."""
    own = 10 * torch.eye(d, dtype=torch.float64)[2:10].view(2, 4, d)
    tasks = noisy([[1], [-1]], batches=4, noise=0) + own
    found = estimate(gram(tasks))
    assert torch.allclose(found.interference, torch.tensor([[1, -1], [-1, 1]], dtype=torch.float64))
    assert torch.equal(batch_gains(gram(tasks)).view(8, 8).diagonal(), torch.zeros(8, dtype=torch.float64))


def test_task_whose_batches_agree_on_nothing_is_not_measurable():
    tasks = noisy([[3, 0], [0, 0]], batches=8, noise=0.3)
    found = estimate(gram(tasks))
    assert found.measurable.tolist() == [True, False]
    assert found.interference[1].isnan().all() and found.error[1].isnan().all()
    assert found.interference[0].isfinite().all() and found.gains.isfinite().all()
    assert len(found.others()[0]) == 1 and math.isnan(found.halves_correlation)


def test_pure_noise_is_seldom_taken_for_a_gain():
    tasks = (noisy([[0]] * 10, batches=6, noise=1, seed=seed) for seed in range(20))
    taken = sum(int(estimate(gram(gradients)).measurable.sum()) for gradients in tasks)
    assert taken < 0.06 * 200


def test_task_without_gradients_is_not_measurable():
    """A of a fresh adapter: B is zero, so no loss depends on A."""
    tasks = noisy([[1], [1], [1]], batches=4, noise=0.1)
    tasks[1] = 0
    found = estimate(gram(tasks))
    assert found.measurable.tolist() == [True, False, True]
    assert found.interference[0, 1] == 0 and found.gains.isfinite().all()


def test_standard_errors_are_the_spread_of_repeated_measurements():
    found = [estimate(gram(noisy([[2, 0], [1, 1]], batches=8, noise=0.3, seed=seed))) for seed in range(200)]
    assert all(one.measurable.all() for one in found)
    values, errors = (torch.stack([getattr(one, name) for one in found])[:, 0, 1] for name in ("interference", "error"))
    assert values.std().item() == pytest.approx(errors.square().mean().sqrt().item(), rel=0.25)
    gains, errors = (torch.stack([getattr(one, name) for one in found])[:, 1, 1] for name in ("gains", "gain_errors"))
    assert gains.std().item() == pytest.approx(errors.square().mean().sqrt().item(), rel=0.25)


def test_one_batch_can_decide_the_mean_of_ratios_but_not_the_ratio_of_means():
    """Task 0 gains 1 from its own steps on five of six batches, and next to nothing on the sixth."""
    tasks = noisy([[1, 0, 0], [1, 1, 0]], batches=6, noise=0)
    tasks[0, 5] = torch.tensor([1e-4, 1, 0] + [0] * (d - 3))
    assert abs(estimate(gram(tasks), MEAN_OF_RATIOS).interference[0, 1]) > 100
    assert abs(estimate(gram(tasks)).interference[0, 1]) < 1.1
