"""The update is added in place only where nobody can see it."""

import pytest
import torch
from torch import nn

from llava_mixlora.method.added_update import added
from llava_mixlora.method.companions import separately

B, S, E, D = 2, 3, 4, 5


def parts(dtype=torch.float64):
    torch.manual_seed(0)
    coefficients = torch.randn(B, S, E, dtype=dtype, requires_grad=True)
    factors_B = torch.randn(E, D, dtype=dtype, requires_grad=True)
    return coefficients, factors_B


def check(base, x, in_place):
    """Value and gradients of base(x) with an update; whether the base's own output is what was changed."""
    coefficients, factors_B = parts()
    expected = base(x).detach() + (coefficients @ factors_B).view(base(x).shape)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (coefficients, factors_B))
    result = base(x)
    output = added(result, coefficients, factors_B, base)
    assert (output.data_ptr() == result.data_ptr()) == in_place
    torch.testing.assert_close(output, expected)
    actual = torch.autograd.grad((output * weight).sum(), (coefficients, factors_B, *([x] if x.requires_grad else [])))
    for one, other in zip(actual, expected_gradients):
        torch.testing.assert_close(one, other)
    if x.requires_grad:
        of_x = torch.autograd.grad((base(x) * weight).sum(), x)[0]
        torch.testing.assert_close(actual[2], of_x)


def linear():
    torch.manual_seed(1)
    return nn.Linear(6, D, bias=False).double().requires_grad_(False)


def input_(requires_grad=True, shape=(B, S, 6)):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(B, S, 6), (B * S, 6)])
def test_a_linear_layers_output_is_changed_in_place(requires_grad, shape):
    check(linear(), input_(requires_grad, shape), in_place=True)


class _Remembering(nn.Module):
    """Returns a view, its own parameter, or what it keeps."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = linear(), form
        self.kept = nn.Parameter(torch.ones(B, S, D, dtype=torch.float64))

    def forward(self, x):
        if self.form == "view":
            return self.linear(x).flatten(0, 1).view(B, S, D)
        if self.form == "parameter":
            return self.kept
        return self.linear(x).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("form", ["view", "transposed"])
def test_views_are_left_as_they_are(form):
    check(_Remembering(form), input_(), in_place=False)


def test_parameters_are_left_as_they_are():
    base = _Remembering("parameter")
    added(base(input_()), *parts(), base)
    assert torch.equal(base.kept, torch.ones_like(base.kept))


def of_layer(see):
    base = linear()
    return base, base.register_forward_hook(see)


def of_part(see):
    base = nn.Sequential(linear())
    return base, base[0].register_forward_hook(see)


def of_all_modules(see):
    return linear(), nn.modules.module.register_module_forward_hook(see)


@pytest.mark.parametrize("hooked", [of_layer, of_part, of_all_modules])
def test_what_hooks_have_seen_is_left_as_it_is(hooked):
    seen = []
    base, handle = hooked(lambda module, args, output: seen.append((output, output.clone())))
    added(base(input_()), *parts(), base)
    handle.remove()
    assert torch.equal(*seen[0])


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_on_gradients_see_those_of_the_layer():
    base, seen = linear(), []
    base.register_full_backward_hook(lambda module, of_input, of_output: seen.append((of_input[0], of_output[0])))
    x = input_()
    coefficients, factors_B = parts()
    added(base(x), coefficients, factors_B, base).sum().backward()
    torch.testing.assert_close(seen[0][1], torch.ones(B, S, D, dtype=torch.float64))
    torch.testing.assert_close(seen[0][0], x.grad)
    torch.testing.assert_close(factors_B.grad, coefficients.detach().sum((0, 1)).unsqueeze(1).expand(E, D))


def test_what_a_program_around_the_layer_keeps_is_left_as_it_is():
    base, x = linear(), input_()
    forward, kept = base.forward, []

    def keeping(x):
        kept.append(forward(x))
        return kept[0]

    base.forward = keeping
    before = forward(x)
    added(base(x), *parts(), base)
    assert torch.equal(kept[0], before)


def test_where_layers_work_separately_nothing_is_changed():
    with separately():
        check(linear(), input_(), in_place=False)


def test_without_gradients_it_is_changed_in_place_too():
    base, x = linear(), input_()
    with torch.no_grad():
        result = base(x)
        expected = result + parts()[0] @ parts()[1]
        output = added(result, *parts(), base)
    assert output is result
    torch.testing.assert_close(output, expected)


def test_an_update_of_higher_precision_is_rounded_once():
    base = linear().to(torch.bfloat16)
    x = input_().to(torch.bfloat16)
    coefficients, factors_B = parts(torch.float32)
    expected = base(x) + (coefficients @ factors_B).to(torch.bfloat16)
    assert torch.equal(added(base(x), coefficients, factors_B, base), expected)


def test_gradients_of_gradients():
    base = linear()
    coefficients, factors_B = parts()
    x = input_()
    assert torch.autograd.gradgradcheck(lambda c, b: added(base(x), c, b, base), (coefficients, factors_B))


def test_under_functorch_nothing_is_changed():
    base, x = linear(), input_()
    coefficients, factors_B = parts()
    gradient = torch.func.grad(lambda b: added(base(x), coefficients, b, base).sum())(factors_B)
    torch.testing.assert_close(gradient, coefficients.sum((0, 1)).unsqueeze(1).expand(E, D))


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_few_rows(rows):
    base = linear()
    x = torch.randn(rows, S, 6, dtype=torch.float64)
    coefficients = torch.randn(rows, S, E, dtype=torch.float64, requires_grad=True)
    output = added(base(x), coefficients, parts()[1], base)
    output.sum().backward()
    assert output.shape == (rows, S, D) and coefficients.grad.shape == coefficients.shape
