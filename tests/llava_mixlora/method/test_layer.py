"""One adapted layer, in every situation in which a model calls it."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llava_mixlora import MixLoraError
from llava_mixlora.method.forward_passes import attach, use_scope
from llava_mixlora.method.model_inputs import IGNORE_INDEX
from llava_mixlora.method.routing_scope import RoutingScope

from ...tiny import layers, paper_form, randomise

D_IN, D_OUT = 12, 10
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Net(nn.Module):
    """One linear layer inside a model with the signature of a language model."""

    def __init__(self, linear=None):
        super().__init__()
        self.proj = nn.Linear(D_IN, D_OUT) if linear is None else linear

    def forward(self, inputs_embeds, attention_mask=None, labels=None):
        return self.proj(inputs_embeds)


def adapt(base=None, effect=True, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "target_modules": ["proj"], **options}
    model = get_peft_model(Net(base), paper_form(**options)).eval()
    return randomise(model, scale=2.0) if effect else model


def only_layer(model):
    (layer,) = layers(model).values()
    return layer


def effect_of(model, *args, **kwargs):
    """The model's output less its base's."""
    with model.disable_adapter():
        base = model(*args, **kwargs)
    return model(*args, **kwargs) - base


@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs", "random"])
def test_fresh_adapter_changes_no_bit(routing):
    base = nn.Linear(D_IN, D_OUT)
    x = torch.randn(3, 5, D_IN)
    expected = base(x)
    assert torch.equal(adapt(base, effect=False, routing=routing)(x), expected)


def test_init_weights_false_starts_with_an_effect():
    x = torch.randn(3, 5, D_IN)
    assert effect_of(adapt(effect=False, init_weights=False), x).abs().max() > 0


def test_parameters_have_the_documented_shapes_and_start():
    layer = only_layer(adapt(effect=False, r=3, num_factors=5))
    shapes = {name.split(".")[0]: tuple(p.shape) for name, p in layer.named_parameters() if "mixlora_" in name}
    assert shapes == {
        "mixlora_A": (5, D_IN),
        "mixlora_B": (5, D_OUT),
        "mixlora_router_A": (5, D_IN),
        "mixlora_router_B": (5, D_IN),
        "mixlora_cfs": (3, 5, D_IN),
    }
    assert layer.mixlora_B["default"].count_nonzero() == 0
    for name in ("mixlora_A", "mixlora_router_A", "mixlora_router_B", "mixlora_cfs"):
        values = getattr(layer, name)["default"]
        assert 0.8 / D_IN**0.5 < values.abs().max() <= 1 / D_IN**0.5


@pytest.mark.parametrize(
    "routing, absent", [("ifs", ["cfs"]), ("random", ["cfs", "router_A", "router_B"]), ("ifs_cfs", [])]
)
def test_routing_owns_only_the_parameters_it_uses(routing, absent):
    layer = only_layer(adapt(routing=routing))
    for name in ("A", "B", "router_A", "router_B", "cfs"):
        assert ("default" in getattr(layer, f"mixlora_{name}")) == (name not in absent)


def test_start_values_do_not_rely_on_torch_init(monkeypatch):
    """`llava.utils.disable_torch_init` makes these resets do nothing."""
    start, base = [], nn.Linear(D_IN, D_OUT)
    for disabled in (False, True):
        if disabled:
            monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
            monkeypatch.setattr(nn.LayerNorm, "reset_parameters", lambda self: None)
        torch.manual_seed(1)
        start.append({n: p for n, p in adapt(base, effect=False).named_parameters() if "mixlora_" in n})
    assert all(torch.equal(start[0][name], start[1][name]) for name in start[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["ifs", "ifs_cfs"]), st.integers(0, 2**16))
def test_instance_does_not_depend_on_its_batch_mates(B, S, routing, seed):
    torch.manual_seed(seed)
    model = adapt(routing=routing)
    x = torch.randn(B, S, D_IN)
    together = model(x)
    index = only_layer(model).last_routes["default"].index_A
    for b in range(B):
        torch.testing.assert_close(model(x[b : b + 1])[0], together[b], **CLOSE)
        assert torch.equal(only_layer(model).last_routes["default"].index_A[0], index[b])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from(["prompt", "sequence"]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_padding_changes_nothing(left, right, router_scope, labelled, seed):
    torch.manual_seed(seed)
    model = adapt(router_scope=router_scope)
    x = torch.randn(1, 4, D_IN)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6]])
    alone = model(inputs_embeds=x, labels=labels if labelled else None)
    padded = torch.cat([torch.randn(1, left, D_IN), x, torch.randn(1, right, D_IN)], 1)
    mask = torch.tensor([[0] * left + [1] * 4 + [0] * right])
    labels = torch.tensor([[IGNORE_INDEX] * left + labels[0].tolist() + [IGNORE_INDEX] * right])
    output = model(inputs_embeds=padded, attention_mask=mask, labels=labels if labelled else None)
    torch.testing.assert_close(output[:, left : left + 4], alone, **CLOSE)


def test_count_padding_averages_the_padding_too():
    x = torch.randn(2, 6, D_IN)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    counting = adapt(router_scope="sequence", count_padding=True)
    assert torch.equal(counting(inputs_embeds=x, attention_mask=mask), counting(inputs_embeds=x))
    ignoring = adapt(router_scope="sequence")
    ignoring(inputs_embeds=x, attention_mask=mask)
    masked = only_layer(ignoring).last_routes["default"].score_A
    ignoring(inputs_embeds=x)
    assert not torch.allclose(masked[0], only_layer(ignoring).last_routes["default"].score_A[0])


def test_row_of_nothing_but_padding_stays_finite():
    model = adapt()
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert model(inputs_embeds=torch.randn(2, 3, D_IN), attention_mask=mask).isfinite().all()


def test_rows_are_instances_of_one_position():
    model = adapt()
    x = torch.randn(4, D_IN)
    torch.testing.assert_close(model(x), model(x.unsqueeze(1)).squeeze(1), **CLOSE)
    assert only_layer(model).last_routes["default"].index_A.shape == (4, 2)


def test_vector_is_one_instance():
    model = adapt()
    x = torch.randn(D_IN)
    torch.testing.assert_close(model(x), model(x.view(1, 1, -1)).view(-1), **CLOSE)


def test_further_dimensions_are_positions():
    model = adapt()
    x = torch.randn(2, 3, 4, D_IN)
    torch.testing.assert_close(model(x), model(x.view(2, 12, D_IN)).view(2, 3, 4, D_OUT), **CLOSE)
    assert only_layer(model).last_routes["default"].index_A.shape == (2, 2)


def test_non_contiguous_input_gives_the_same():
    model = adapt()
    x = torch.randn(5, 3, D_IN).transpose(0, 1)
    torch.testing.assert_close(model(x), model(x.contiguous()), **CLOSE)
    wide = torch.randn(2, 4, 3, D_IN).transpose(1, 2)
    torch.testing.assert_close(model(wide), model(wide.contiguous()), **CLOSE)


def test_empty_batch_passes():
    assert adapt()(torch.randn(0, 3, D_IN)).shape == (0, 3, D_OUT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs", "random"])
def test_half_precision_base_keeps_float32_adapters_and_its_own_output_dtype(dtype, routing):
    model = adapt(nn.Linear(D_IN, D_OUT).to(dtype), routing=routing)
    assert {p.dtype for n, p in model.named_parameters() if "mixlora_" in n} == {torch.float32}
    x = torch.randn(2, 3, D_IN).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if p.requires_grad)
    exact = adapt(nn.Linear(D_IN, D_OUT), routing=routing)
    torch.testing.assert_close(effect_of(model, x).float(), effect_of(exact, x.float()), atol=0.05, rtol=0.05)


def test_adapter_in_the_dtype_of_a_half_precision_model():
    model = adapt(nn.Linear(D_IN, D_OUT).bfloat16()).to(torch.bfloat16)
    x = torch.randn(2, 3, D_IN, dtype=torch.bfloat16, requires_grad=True)
    model(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_update_in_its_dtype_and_the_routes_in_float32(dtype):
    model = adapt()
    x = torch.randn(4, 3, D_IN)
    exact = model(x)
    route = only_layer(model).last_routes["default"]
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.1)
    autocast_route = only_layer(model).last_routes["default"]
    assert autocast_route.score_A.dtype == torch.float32
    torch.testing.assert_close(autocast_route.score_A, route.score_A)
    assert torch.equal(autocast_route.index_B, route.index_B)
    y.float().sum().backward()
    assert only_layer(model).mixlora_router_A["default"].grad.isfinite().all()


def test_dropout_acts_in_training_only():
    model = adapt(lora_dropout=0.5)
    x = torch.randn(2, 3, D_IN)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_dropout_never_reaches_the_routers():
    model = adapt(lora_dropout=0.9)
    x = torch.randn(2, 3, D_IN)
    model(x)
    route = only_layer(model).last_routes["default"]
    model.train()
    model(x)
    assert torch.equal(only_layer(model).last_routes["default"].score_A, route.score_A)
    assert torch.equal(only_layer(model).last_routes["default"].score_B, route.score_B)


def test_random_routing_draws_per_instance_in_training_and_once_in_evaluation():
    model = adapt(routing="random", num_factors=16, r=4)
    x = torch.randn(20, 3, D_IN)
    model(x)
    route = only_layer(model).last_routes["default"]
    assert len(route.index_A.unique(dim=0)) == len(route.index_B.unique(dim=0)) == 1
    assert torch.equal(model(x), model(x))
    model.train()
    model(x)
    drawn = only_layer(model).last_routes["default"].index_A
    assert len(drawn.unique(dim=0)) > 10
    model(x)
    assert not torch.equal(only_layer(model).last_routes["default"].index_A, drawn)


def test_random_routing_does_not_disturb_the_global_generator_in_evaluation():
    model = adapt(routing="random")
    state = torch.get_rng_state()
    model(torch.randn(1, 2, D_IN, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_routing_survives_saving(tmp_path):
    base = nn.Linear(D_IN, D_OUT)
    model = adapt(base, routing="random")
    x = torch.randn(2, 3, D_IN)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = nn.Linear(D_IN, D_OUT)
    fresh.load_state_dict({"weight": base.weight, "bias": base.bias})
    assert torch.equal(PeftModel.from_pretrained(Net(fresh), tmp_path)(x), expected)


@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs"])
@pytest.mark.parametrize("router_gradient", ["straight_through", "none"])
def test_one_step_moves_every_router_or_none(routing, router_gradient):
    model = adapt(routing=routing, router_gradient=router_gradient).train()
    routers = {n: p for n, p in model.named_parameters() if "router" in n or "cfs" in n}
    assert len(routers) == (3 if routing == "ifs_cfs" else 2)
    before = {name: parameter.detach().clone() for name, parameter in routers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(8, 3, D_IN)).pow(2).sum().backward()
    optimizer.step()
    for name, parameter in routers.items():
        moved = parameter != before[name]
        if router_gradient == "none":
            assert not moved.any(), name
        else:
            assert moved.all(), name


def test_routers_of_the_first_step_learn_with_the_second():
    """Pool B starts at zero, so the first backward gives only pool B a gradient."""
    model = adapt(effect=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = only_layer(model)
    before = layer.mixlora_router_A["default"].detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, D_IN)).pow(2).sum().backward()
        optimizer.step()
    assert (layer.mixlora_router_A["default"] != before).any()


def test_transposed_linear_of_gpt2_is_adapted():
    model = adapt(Conv1D(D_OUT, D_IN))
    layer = only_layer(model)
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    x = torch.randn(2, 3, D_IN)
    torch.testing.assert_close(effect_of(model, x), effect_of(adapt(), x), **CLOSE)


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 1)])
def test_module_that_is_not_linear_is_refused(module):
    with pytest.raises(MixLoraError, match=type(module).__name__):
        adapt(module)


class Opaque(nn.Module):
    """A linear map that shows its widths and how to call it; its storage is nothing that PEFT has heard of."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        self.packed = nn.Parameter(torch.randint(-128, 127, (D_OUT * D_IN,), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.packed.float() / 128).view(D_OUT, D_IN).t()


def test_base_layer_without_a_weight_is_only_called():
    base = Opaque()
    x = torch.randn(2, 3, D_IN)
    expected = base(x)
    model = adapt(base)
    torch.testing.assert_close(effect_of(model, x), effect_of(adapt(), x), **CLOSE)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_further_arguments_reach_the_base_layer():
    class Scaled(Opaque):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    layer = only_layer(adapt(Scaled()))
    x = torch.randn(2, 3, D_IN)
    torch.testing.assert_close(layer(x, scale=3.0) - layer(x), 2 * layer.base_layer(x), **CLOSE)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantized_base_layer_is_only_called(kind):
    import bitsandbytes

    dense = nn.Linear(64, 32)
    options = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    base = getattr(bitsandbytes.nn, kind)(64, 32, **options)
    base.load_state_dict(dense.state_dict())
    base = base.to("cpu").eval()
    x = torch.randn(2, 3, 64, requires_grad=True)
    before = base(x).detach()
    model = adapt(base)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    torch.testing.assert_close(effect_of(model, x), effect_of(adapt(dense), x), atol=1e-3, rtol=1e-3)
    model(x).sum().backward()
    assert x.grad.isfinite().all() and only_layer(model).mixlora_B["default"].grad.abs().sum() > 0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


@pytest.mark.parametrize("routing", ["ifs", "ifs_cfs"])
def test_backward_pass_needs_no_copy_of_a_pool_or_router(routing):
    layer = only_layer(adapt(nn.Linear(64, 8), routing=routing, num_factors=6)).train()
    parameters, kept = {parameter.data_ptr() for parameter in layer.parameters()}, []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(torch.randn(1, 3, 64))
    assert output.requires_grad and 0 < max(kept) < 4 * 6 * 64


def test_layer_works_without_any_routing_scope():
    model = adapt()
    layer = only_layer(model)
    x = torch.randn(2, 3, D_IN)
    assert torch.equal(layer(x), model(x))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("in_scope", [False, True])
def test_compiled_forward_has_no_graph_break(in_scope, trains):
    layer = only_layer(adapt()).train(trains)
    x = torch.randn(2, 3, D_IN)
    scope = RoutingScope((2, 3), attended=torch.tensor([[True, True, False], [True] * 3])) if in_scope else None
    if in_scope:
        scope.trains = trains
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with use_scope(scope):
        torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    if in_scope:
        scope.statistics.add()
    assert layer.mixlora_stats_usage["default"].sum() == (2 * 2 * 2 * 2 if in_scope and trains else 0)


@contextlib.contextmanager
def _adapters(model, *names):
    active = model.base_model.active_adapters
    model.base_model.set_adapter(list(names))
    yield
    model.base_model.set_adapter(active)


def test_several_active_adapters_add_up():
    model = adapt()
    model.add_adapter("other", paper_form(r=1, num_factors=3, lora_alpha=4, target_modules=["proj"], routing="ifs"))
    randomise(model, seed=5, scale=2.0)
    x = torch.randn(2, 3, D_IN)
    default = effect_of(model, x)
    with _adapters(model, "other"):
        other = effect_of(model, x)
    with _adapters(model, "default", "other"):
        both = effect_of(model, x)
    assert other.abs().max() > 0.1
    torch.testing.assert_close(both, default + other, **CLOSE)


def test_scope_hooks_are_attached_once():
    model = adapt()
    net = model.base_model.model
    attach(net)
    assert len(net._forward_pre_hooks) == len(net._forward_hooks) == 1
