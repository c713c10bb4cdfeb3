"""The mathematics against a float64 reference that follows the paper's formulas factor by factor."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from llava_mixlora.method.mixture import (
    Route,
    conditional_scores,
    core,
    input_scores,
    low_rank_update,
    pooled_input,
    route_at_random,
)

from ...tiny import paper_form

FLOAT64 = {"atol": 1e-9, "rtol": 1e-9}
PARAMETERS = ("mixlora_A", "mixlora_B", "mixlora_router_A", "mixlora_router_B", "mixlora_cfs")


@st.composite
def shapes(draw):
    E = draw(st.integers(1, 7))
    return {
        "E": E,
        "r": draw(st.integers(1, E)),
        "d_in": draw(st.integers(1, 6)),
        "d_out": draw(st.integers(1, 6)),
        "B": draw(st.integers(1, 3)),
        "S": draw(st.integers(1, 4)),
        "routing": draw(st.sampled_from(["ifs", "ifs_cfs"])),
        "cfs_product": draw(st.sampled_from(["inner", "sums"])),
        "router_gradient": draw(st.sampled_from(["straight_through", "none"])),
        "seed": draw(st.integers(0, 2**16)),
    }


def softmax(values):
    exponentials = [torch.exp(value - max(v.item() for v in values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def top(scores, r):
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:r]


def closest_scores(scores):
    ordered = sorted(score.item() for score in scores)
    return min((b - a for a, b in zip(ordered, ordered[1:])), default=1.0)


def reference(x, A, B, R_A, R_B, W_AB, r, alpha, product, straight_through):
    """Δy, the routes and the smallest distance between two ranked scores; one instance, one position at a time."""
    E, d_in = A.shape
    outputs, routes, margin = [], [], 1.0
    for instance in x:
        mean = sum(instance) / len(instance)
        p_A = softmax([sum(R_A[e, d] * mean[d] for d in range(d_in)) for e in range(E)])
        p_B = softmax([sum(R_B[e, d] * mean[d] for d in range(d_in)) for e in range(E)])
        index_A = top(p_A, r)
        score_B = p_B
        if W_AB is not None:
            total = [0.0] * E
            for i in range(r):
                a = A[index_A[i]]
                if product == "inner":
                    logits = [sum(W_AB[i, e, d] * a[d] for d in range(d_in)) for e in range(E)]
                else:  # the authors' einsum, whose two letters for d_in never meet
                    logits = torch.einsum("brd,rfe->bre", a[None, None], W_AB[i].t()[None])[0, 0]
                total = [before + now for before, now in zip(total, softmax(list(logits)))]
            score_B = [b + ab for b, ab in zip(p_B, softmax(total))]
        index_B = top(score_B, r)
        margin = min(margin, closest_scores(p_A), closest_scores(score_B))
        routes.append((index_A, index_B))
        rows = []
        for position in instance:
            row = 0.0
            for j in range(r):
                gate = 1.0
                if straight_through:
                    p, q = p_A[index_A[j]], score_B[index_B[j]]
                    gate = (1 + p - p.detach()) * (1 + q - q.detach())
                projection = sum(A[index_A[j], d] * position[d] for d in range(d_in))
                row = row + alpha / r * gate * projection * B[index_B[j]]
            rows.append(row)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs), routes, margin


def adapted_layer(shape, alpha):
    """A layer in float64 whose base contributes nothing, with random pools and routers."""
    model = nn.Sequential(nn.Linear(shape["d_in"], shape["d_out"], bias=False))
    nn.init.zeros_(model[0].weight)
    config = paper_form(
        r=shape["r"],
        num_factors=shape["E"],
        lora_alpha=alpha,
        routing=shape["routing"],
        router_gradient=shape["router_gradient"],
        cfs_product=shape["cfs_product"],
        target_modules=["0"],
    )
    layer = get_peft_model(model, config).base_model.model[0].double()
    for name in PARAMETERS:
        for parameter in getattr(layer, name).values():
            nn.init.normal_(parameter)
    return layer


@settings(max_examples=60, deadline=None)
@given(shapes(), st.floats(0.5, 40))
def test_outputs_routes_and_gradients_follow_the_formulas(shape, alpha):
    torch.manual_seed(shape["seed"])
    layer = adapted_layer(shape, alpha)
    parameters = {name: pool["default"] for name in PARAMETERS if "default" in (pool := getattr(layer, name))}
    straight_through = shape["router_gradient"] == "straight_through"
    x = torch.randn(shape["B"], shape["S"], shape["d_in"], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape["B"], shape["S"], shape["d_out"], dtype=torch.float64)
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    y, routes, margin = reference(
        x,
        copies["mixlora_A"],
        copies["mixlora_B"],
        copies["mixlora_router_A"],
        copies["mixlora_router_B"],
        copies.get("mixlora_cfs"),
        shape["r"],
        alpha,
        shape["cfs_product"],
        straight_through,
    )
    assume(margin > 1e-9)  # nobody says which of two equal scores ranks first
    expected = torch.autograd.grad(y, [x, *copies.values()], grad, allow_unused=True)

    output = layer(x)
    torch.testing.assert_close(output, y, **FLOAT64)
    route = layer.last_routes["default"]
    assert [(a, b) for a, b in zip(route.index_A.tolist(), route.index_B.tolist())] == routes

    output.backward(grad)
    for name, tensor, gradient in zip(["x", *copies], [x, *parameters.values()], expected):
        if gradient is None:
            assert tensor.grad is None, name
        else:
            torch.testing.assert_close(tensor.grad, gradient, msg=name, **FLOAT64)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.floats(0.5, 40))
def test_core_form_equals_the_materialised_weight(shape, alpha):
    torch.manual_seed(shape["seed"])
    E, r, B = shape["E"], shape["r"], shape["B"]
    factors_A = torch.randn(E, shape["d_in"], dtype=torch.float64)
    factors_B = torch.randn(E, shape["d_out"], dtype=torch.float64)
    x = torch.randn(B, shape["S"], shape["d_in"], dtype=torch.float64)
    route = route_at_random(B, E, r, x.device)
    update = low_rank_update(x, factors_A, factors_B, core(route, E, alpha / r, False, x.dtype))
    for b in range(B):
        pairs = zip(route.index_A[b], route.index_B[b])
        weight = alpha / r * sum(torch.outer(factors_B[j], factors_A[i]) for i, j in pairs)
        torch.testing.assert_close(update[b], x[b] @ weight.t(), **FLOAT64)


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_sums_product_is_the_authors_einsum(shape):
    torch.manual_seed(shape["seed"])
    E, r, B, d_in = shape["E"], shape["r"], shape["B"], shape["d_in"]
    factors_A = torch.randn(E, d_in, dtype=torch.float64)
    cfs = torch.randn(r, E, d_in, dtype=torch.float64)
    index_A = route_at_random(B, E, r, factors_A.device).index_A
    logits = torch.einsum("brd,rfe->bre", factors_A[index_A], cfs.transpose(1, 2))
    expected = logits.softmax(-1).sum(1).softmax(-1)
    torch.testing.assert_close(conditional_scores(factors_A, cfs, index_A, "sums"), expected, **FLOAT64)


def test_inner_and_sums_differ():
    factors_A, cfs, index_A = torch.randn(4, 3), torch.randn(2, 4, 3), torch.tensor([[0, 1]])
    assert not torch.allclose(
        conditional_scores(factors_A, cfs, index_A, "inner"), conditional_scores(factors_A, cfs, index_A, "sums")
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_random_routes_hold_distinct_factors(instances, E, data):
    r = data.draw(st.integers(1, E))
    route = route_at_random(instances, E, r, torch.device("cpu"))
    for index in (route.index_A, route.index_B):
        assert index.shape == (instances, r)
        assert all(len(set(row)) == r and set(row) <= set(range(E)) for row in index.tolist())


def test_random_routes_use_every_factor_about_equally():
    route = route_at_random(8000, 4, 1, torch.device("cpu"))
    for index in (route.index_A, route.index_B):
        shares = index.flatten().bincount(minlength=4) / 8000
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_computes_in_float32(dtype):
    x = torch.randn(2, 300, 8).to(dtype)
    pooled = pooled_input(x, None)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, x.double().mean(1).float())
    weighted = pooled_input(x, torch.full((2, 300), 1 / 300))
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, pooled)
    assert input_scores(pooled, torch.randn(4, 8).to(dtype)).dtype == torch.float32
    assert conditional_scores(
        torch.randn(4, 8).to(dtype), torch.randn(1, 4, 8), torch.zeros(2, 1, dtype=int)
    ).dtype == (torch.float32)


def test_core_holds_the_scaling_at_the_chosen_pairs_only():
    route = Route(torch.tensor([[2, 0]]), torch.tensor([[1, 2]]), None, None)
    expected = torch.zeros(1, 3, 3)
    expected[0, 2, 1] = expected[0, 0, 2] = 8.0
    assert torch.equal(core(route, 3, 8.0, True, torch.float32), expected)


def test_gates_are_exactly_one_in_value():
    score = torch.rand(50, 6).softmax(-1).requires_grad_()
    index = score.topk(3, -1).indices
    values = core(Route(index, index, score, score), 6, 8.0, True, torch.float32)
    assert set(values.unique().tolist()) == {0.0, 8.0}


def test_detached_route_has_no_history():
    score = torch.rand(1, 4, requires_grad=True).softmax(-1)
    route = Route(torch.tensor([[0]]), torch.tensor([[1]]), score, None).detach()
    assert not route.score_A.requires_grad and route.score_B is None
    assert math.isclose(route.score_A.sum().item(), 1.0, rel_tol=1e-6)
