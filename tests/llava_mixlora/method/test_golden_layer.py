"""One adapted layer against numbers that the authors' released code produced (tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from llava_mixlora import MixLoraConfig

GOLDEN = Path(__file__).parents[2] / "golden"
POOLS = {"grad_pool_A": "mixlora_A", "grad_pool_B": "mixlora_B"}


class OneLinear(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0])
        self.proj.weight.data, self.proj.bias.data = weight, bias

    def forward(self, x):
        return self.proj(x)


@pytest.fixture(params=["ifs", "ifs_cfs"])
def golden(request):
    """The tensors of one golden file, and the same layer built here with the `paper()` settings."""
    tensors = load_file(GOLDEN / f"layer_{request.param}.safetensors")
    (E, d_in), r = tensors["pool_A"].shape, tensors["indices_A"].shape[1]
    config = MixLoraConfig.paper(r=r, num_factors=E, lora_alpha=16, routing=request.param, target_modules=["proj"])
    model = get_peft_model(OneLinear(tensors["base.weight"], tensors["base.bias"]), config)
    layer = model.base_model.model.proj
    layer.mixlora_A["default"].data = tensors["pool_A"]
    layer.mixlora_B["default"].data = tensors["pool_B"]
    layer.mixlora_router_A["default"].data = tensors["router_A.weight"]
    layer.mixlora_router_B["default"].data = tensors["router_B.weight"]
    if request.param == "ifs_cfs":
        layer.mixlora_cfs["default"].data = tensors["cfs.weight"].view(E, r, d_in).transpose(0, 1).contiguous()
    return tensors, layer


def test_outputs_and_indices_equal_the_authors(golden):
    tensors, layer = golden
    torch.testing.assert_close(layer(tensors["x"]), tensors["y"], atol=1e-5, rtol=1e-5)
    route = layer.last_routes["default"]
    assert torch.equal(route.index_A, tensors["indices_A"])
    assert torch.equal(route.index_B, tensors["indices_B"])


def test_gradients_equal_the_authors(golden):
    tensors, layer = golden
    x = tensors["x"].clone().requires_grad_()
    layer(x).backward(tensors["grad_y"])
    torch.testing.assert_close(x.grad, tensors["grad_x"], atol=1e-5, rtol=1e-5)
    for name, parameter in POOLS.items():
        torch.testing.assert_close(getattr(layer, parameter)["default"].grad, tensors[name], atol=1e-5, rtol=1e-5)


def test_paper_settings_train_no_router(golden):
    tensors, layer = golden
    layer(tensors["x"]).backward(tensors["grad_y"])
    routers = (layer.mixlora_router_A, layer.mixlora_router_B, layer.mixlora_cfs)
    assert all(
        parameter.grad is None and not parameter.requires_grad for pool in routers for parameter in pool.values()
    )
