"""Static stand-ins for the conditional update, against brute force in float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_mixlora.method.mixture import Route, core
from llava_mixlora.method.static_core import (
    InputMoments,
    Moments,
    instance_input_moments,
    instance_moments,
    low_rank_pair,
    lstsq_core,
    mean_core,
    regression_map,
    squared_error,
    squared_error_of_map,
    squared_norm,
)

pytestmark = pytest.mark.one_stack

SCALING = 1.5
shapes = given(
    B=st.integers(1, 6),
    S=st.integers(1, 8),
    E=st.integers(1, 5),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
quick = settings(max_examples=60, deadline=None)


class Case:
    """Random inputs, pools and cores, and the sums over them."""

    def __init__(self, B, S, E, d_in, d_out, seed, same_route=False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.r = r = 1 + seed % E
        self.x, self.A, self.B = draw(B, S, d_in), draw(E, d_in), draw(E, d_out)
        index_A, index_B = (draw(1 if same_route else B, E).topk(r).indices.expand(B, r) for _ in range(2))
        self.cores = core(Route(index_A, index_B, None, None), E, SCALING, False, torch.float64)
        self.z = self.x @ self.A.t()
        self.entries = r * SCALING
        self.moments = Moments(*instance_moments(self.z, self.cores))
        self.inputs = instance_input_moments(self.x, self.z, self.cores)
        self.expected = self.z @ self.cores @ self.B

    def error(self, output):
        return (self.expected - output).square().sum()

    def static_updates(self):
        """By method: the W of x W B."""
        mean, lstsq = (make(self.moments, self.entries) for make in (mean_core, lstsq_core))
        regression = regression_map(self.inputs, self.A, lstsq)
        return {"mean": self.A.t() @ mean, "lstsq": self.A.t() @ lstsq, "regression": regression}


@quick
@shapes
def test_every_method_is_exact_where_all_routes_are_equal(B, S, E, d_in, d_out, seed):
    case = Case(B, S, E, d_in, d_out, seed, same_route=True)
    unseen = torch.randn(5, d_in, dtype=torch.float64)
    for weight in case.static_updates().values():
        torch.testing.assert_close(case.x @ weight @ case.B, case.expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            unseen @ weight @ case.B, unseen @ case.A.t() @ case.cores[0] @ case.B, atol=1e-5, rtol=1e-5
        )


@quick
@shapes
def test_lstsq_is_never_worse_than_mean_nor_regression_than_lstsq(B, S, E, d_in, d_out, seed):
    case = Case(B, S, E, d_in, d_out, seed)
    errors = {method: case.error(case.x @ weight @ case.B) for method, weight in case.static_updates().items()}
    slack = 1e-9 * case.expected.square().sum()
    assert errors["lstsq"] <= errors["mean"] + slack
    assert errors["regression"] <= errors["lstsq"] + slack


@quick
@shapes
def test_lstsq_is_the_least_whatever_the_rows_of_b(B, S, E, d_in, d_out, seed):
    """Also where rows of B are dependent, as with d_out < E."""
    case = Case(B, S, E, d_in, d_out, seed)
    seen = torch.linalg.eigvalsh(case.moments.gram)
    assume(((seen > 1e-6 * seen[-1]) | (seen < 1e-12 * seen[-1])).all())  # clearly seen, or clearly not
    found = lstsq_core(case.moments, case.entries)
    # Σ ‖z C B − z M B‖² as an ordinary least squares problem in vec(M).
    design = torch.kron(case.z.flatten(0, 1), case.B.t().contiguous())
    least = torch.linalg.lstsq(design, case.expected.flatten(), driver="gelsd").solution
    best = (design @ least - case.expected.flatten()).square().sum()
    torch.testing.assert_close(case.error(case.z @ found @ case.B), best, atol=1e-8, rtol=1e-6)


@quick
@shapes
def test_errors_from_sums_are_those_over_positions(B, S, E, d_in, d_out, seed):
    case = Case(B, S, E, d_in, d_out, seed)
    M, W = torch.randn(E, E, dtype=torch.float64), torch.randn(d_in, E, dtype=torch.float64)
    close = {"atol": 1e-8, "rtol": 1e-8}
    torch.testing.assert_close(squared_error(case.moments, case.B, M), case.error(case.z @ M @ case.B), **close)
    from_map = squared_error_of_map(case.moments.power, case.inputs, case.B, W)
    torch.testing.assert_close(from_map, case.error(case.x @ W @ case.B), **close)
    torch.testing.assert_close(squared_norm(case.moments, case.B), case.expected.square().sum(), **close)


@quick
@shapes
def test_mean_core_is_the_mean(B, S, E, d_in, d_out, seed):
    case = Case(B, S, E, d_in, d_out, seed)
    torch.testing.assert_close(mean_core(case.moments, case.entries), case.cores.mean(dim=0))


def test_padding_does_not_count():
    case = Case(B=2, S=4, E=3, d_in=5, d_out=4, seed=1)
    attended = torch.tensor([[True, True, False, False], [False, True, True, True]])
    rows = [(case.x[b : b + 1, attended[b]], case.cores[b : b + 1]) for b in range(2)]
    alone = sum(instance_moments(x @ case.A.t(), C) for x, C in rows)
    torch.testing.assert_close(instance_moments(case.z, case.cores, attended), alone)
    inputs = [instance_input_moments(x, x @ case.A.t(), C) for x, C in rows]
    masked = instance_input_moments(case.x, case.z, case.cores, attended)
    for found, parts in zip(masked, zip(*inputs)):
        torch.testing.assert_close(found, sum(parts))


def test_half_precision_is_summed_in_float32():
    z, cores = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    assert instance_moments(z, cores)[1].item() == 4096


def test_sums_that_rounding_made_indefinite_are_solved():
    case = Case(B=4, S=6, E=3, d_in=6, d_out=4, seed=3)
    lowest = torch.linalg.eigvalsh(case.inputs.second)[0]
    shifted = case.inputs.second - (lowest + 1e-4) * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(shifted).info > 0
    lstsq = lstsq_core(case.moments, case.entries)
    assert regression_map(InputMoments(shifted, case.inputs.cross), case.A, lstsq).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pair_is_a_lora_in_float32(dtype):
    case = Case(B=3, S=4, E=3, d_in=5, d_out=4, seed=2)
    M = lstsq_core(case.moments, case.entries)
    down, up = low_rank_pair(case.A.to(dtype), case.B.to(dtype), M)
    assert down.shape == (3, 5) and up.shape == (4, 3) and down.dtype == up.dtype == torch.float32
    expected = case.x @ case.A.to(dtype).double().t() @ M @ case.B.to(dtype).double()
    torch.testing.assert_close(case.x.float() @ down.t() @ up.t(), expected.float(), atol=1e-4, rtol=1e-4)
