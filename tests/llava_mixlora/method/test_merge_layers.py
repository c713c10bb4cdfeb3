"""Merging through PEFT: `merge_and_unload`, `merge_adapter`, `unmerge_adapter`."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from llava_mixlora import MixLoraError
from llava_mixlora.method.merged_weight import merged_weight
from llava_mixlora.method.static_core import lstsq_core, squared_error, squared_norm

from ...tiny import layers, newer_peft, paper_form, random_ids, randomise

IDS = random_ids(2, 6)


def adapt(model, trained=True, **options):
    """An adapter with an effect and, when trained, with statistics."""
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = randomise(get_peft_model(model, paper_form(**options)))
    if trained:
        train(model)
    return model.eval()


def train(model):
    for seed in range(3):
        ids = random_ids(3, 9, seed=seed)
        model.train()(input_ids=ids, labels=ids)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "mixlora" not in name}


def same_bits(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{"r": 1, "num_factors": 1}, {"r": 2, "num_factors": 2, "lora_alpha": 3}])
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_merging_is_exact_where_all_routes_are_equal(llama, options, dtype, rounding):
    """With E = r = 1 there is one route; with equal routers, all inputs take the same."""
    model = adapt(llama.to(dtype), trained=False, **options)
    for name, parameter in model.named_parameters():
        if "router" in name or "cfs" in name:
            parameter.data.zero_()
    train(model)
    expected = logits(model.eval())
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM and not layers(merged)
    assert (logits(merged) - expected).abs().max() < rounding * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(llama, dtype):
    model = adapt(llama).to(dtype)
    before, expected = bits(model), logits(model)
    model.merge_adapter()
    assert not same_bits(bits(model), before) and not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert same_bits(bits(model), before) and torch.equal(logits(model), expected)


def test_disabling_a_merged_adapter_shows_the_base(llama):
    model = adapt(llama)
    with model.disable_adapter():
        expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_several_adapters_merge_together_or_one_after_the_other(llama):
    model = adapt(llama)
    model.add_adapter("other", paper_form(r=1, num_factors=3, lora_alpha=4, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    randomise(model, seed=5)
    train(model)
    before = bits(model.eval())
    model.merge_adapter(["default", "other"])
    together = logits(model)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally"):
        model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), together, atol=1e-4, rtol=1e-4)
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model).values())
    model.unmerge_adapter()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_without_statistics_is_refused_in_one_line_and_harms_nothing(llama, merge):
    model = adapt(llama, trained=False)
    expected = logits(model)
    with pytest.raises(MixLoraError, match="--calibration") as error:
        getattr(model, merge)()
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected) and layers(model)


def test_fresh_adapter_merges_without_effect(llama):
    expected = logits(llama)
    model = get_peft_model(llama, paper_form(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model.merge_and_unload().eval()), expected)


def test_safe_merge_refuses_what_is_not_finite(llama):
    model = adapt(llama)
    before = bits(model)
    layers(model)["base_model.model.model.layers.1.mlp.down_proj"].mixlora_B["default"].data[0, 0] = torch.inf
    with pytest.raises(MixLoraError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(bits(model), before)
    with pytest.warns(UserWarning, match="nothing to take back"):
        model.unmerge_adapter()


class Net(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, inputs_embeds):
        return self.proj(inputs_embeds)


def adapt_layer(base):
    model = randomise(get_peft_model(Net(base), paper_form(r=2, num_factors=4, target_modules=["proj"])))
    model.train()(torch.randn(4, 5, 64))
    return model.eval()


def test_merged_layer_is_as_far_off_as_the_statistics_say():
    model = randomise(get_peft_model(Net(nn.Linear(64, 32)), paper_form(r=2, num_factors=4, target_modules=["proj"])))
    x = torch.randn(40, 5, 64)
    dynamic = model.train()(x).detach()
    (layer,) = layers(model.eval()).values()
    moments, factors_B = layer.moments("default"), layer.mixlora_B["default"].detach()
    expected = squared_error(moments, factors_B, lstsq_core(moments, 2 * layer.scaling["default"]))
    model.merge_adapter()
    found = (model(x) - dynamic).double().square().sum()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert 0.1 < found / squared_norm(moments, factors_B) < 1


def test_transposed_linear_of_gpt2_is_merged():
    dense, transposed = nn.Linear(64, 32), Conv1D(32, 64)
    transposed.load_state_dict({"weight": dense.weight.t(), "bias": dense.bias})
    model = adapt_layer(dense)
    other = copy.deepcopy(model)
    layers(other)["base_model.model.proj"].base_layer = transposed
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(other.merge_and_unload()(x), model.merge_and_unload()(x), atol=1e-5, rtol=1e-5)


@newer_peft
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("has_run", [False, True])
def test_quantized_weight_is_dequantized_and_quantized_again(kind, has_run):
    import bitsandbytes

    dense = nn.Linear(64, 32)
    options = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    base = getattr(bitsandbytes.nn, kind)(64, 32, **options)
    base.load_state_dict(dense.state_dict())
    model = adapt_layer(base.to("cpu").eval())
    x = torch.randn(2, 3, 64)
    (layer,) = layers(model).values()
    with torch.no_grad():
        exact = layer.base_layer(x) + x @ layer.get_delta_weight("default").t()
        if has_run:
            before = model(x)
        with pytest.warns(UserWarning, match="quantizes its weight again"):
            model.merge_adapter()
        assert (model(x) - exact).norm() / exact.norm() < (0.2 if kind == "Linear4bit" else 0.03)
        model.unmerge_adapter()
        if has_run:
            assert torch.equal(model(x), before)
        with pytest.warns(UserWarning, match="quantizes its weight again"):
            merged = model.merge_and_unload()
        assert type(merged.proj).__name__ == kind
        assert (merged(x) - exact).norm() / exact.norm() < (0.2 if kind == "Linear4bit" else 0.03)


@newer_peft
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_weight_in_the_layout_of_bfloat16_processors_is_merged(compress_statistics):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    base = Linear4bit(64, 32, quant_type="nf4", compress_statistics=compress_statistics)
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    model = adapt_layer(base.to("cpu"))  # in training mode a layer never takes that layout by itself
    other = copy.deepcopy(model)
    (layer,) = layers(other).values()
    weight = layer.base_layer.weight
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.warns(UserWarning, match="quantizes its weight again"):
        merged, expected = other.merge_and_unload(), model.merge_and_unload()
    x = torch.randn(2, 3, 64)
    assert (merged(x) - expected(x)).norm() / expected(x).norm() < 0.05


def test_layer_without_a_weight_is_named():
    class Opaque(nn.Module):
        in_features, out_features = 64, 32

        def forward(self, x):
            return x[..., :32]

    with pytest.raises(MixLoraError, match="Opaque cannot take up an adapter"):
        merged_weight(Opaque(), torch.zeros(32, 64))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_merge_that_loses_by_the_statistics_warns_once_in_one_line(llama, merge):
    model = adapt(llama)
    with pytest.warns(UserWarning, match="merging adapter 'default' loses") as warned:
        getattr(model, merge)()
    (said,) = [str(each.message) for each in warned if "merging adapter" in str(each.message)]
    assert "\n" not in said and "% of the dynamic one" in said and "llava-mixlora merge" in said


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_merge_that_loses_nothing_does_not_warn(llama, recwarn, merge):
    getattr(adapt(llama, r=1, num_factors=1), merge)()
    assert not [each for each in recwarn if "merging adapter" in str(each.message)]
