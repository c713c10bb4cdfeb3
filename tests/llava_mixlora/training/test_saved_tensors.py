"""Which tensors go into the adapter's file, and which beside it."""

import pytest
import torch

from llava_mixlora.training.saved_tensors import beside_the_adapter, with_the_adapter

pytestmark = pytest.mark.one_stack

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def parameters(adapter):
    """By name, of a model with an adapter on one layer; those that were trained are marked."""
    names = {
        "base_model.model.model.embed_tokens.weight": False,
        f"{LAYER}.base_layer.weight": False,
        f"{LAYER}.base_layer.bias": True,
        f"{LAYER}.{adapter}": True,
        "base_model.model.model.layers.0.mlp.up_proj.bias": True,
        "base_model.model.model.vision_tower.vision_tower.q_proj.bias": False,
        "base_model.model.model.mm_projector.0.bias": False,
        "base_model.model.lm_head.weight": False,
    }
    return {name: torch.nn.Parameter(torch.zeros(1), requires_grad=trained) for name, trained in names.items()}


@pytest.fixture(params=["lora_A.default.weight", "mixlora_A.default"])
def named(request):
    return parameters(request.param)


@pytest.mark.parametrize(
    "bias, expected",
    [
        ("none", []),
        ("lora_only", [f"{LAYER}.base_layer.bias"]),
        ("all", [f"{LAYER}.base_layer.bias", "base_model.model.model.layers.0.mlp.up_proj.bias"]),
    ],
)
def test_biases_go_with_the_adapter_as_the_flag_says(named, bias, expected):
    saved = [name for name, _ in with_the_adapter(named.items(), bias)]
    assert [name for name in saved if "lora_" not in name] == expected
    assert len(saved) == len(expected) + 1


def test_projector_lies_beside_the_adapter_even_if_frozen(named):
    saved = dict(beside_the_adapter(named.items(), grown=False))
    assert "base_model.model.model.mm_projector.0.bias" in saved
    assert not any(word in name for name in saved for word in ("lora_", "embed_tokens", "lm_head", "vision_tower"))


def test_biases_beside_the_adapter_have_the_names_of_the_bare_model(named):
    assert f"{LAYER}.bias" in dict(beside_the_adapter(named.items(), grown=False))


def test_grown_vocabulary_lies_beside_the_adapter(named):
    saved = set(dict(beside_the_adapter(named.items(), grown=True)))
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= saved
