"""What several tests do to the tiny models of conftest.py."""

import torch
from torch import nn

from llava_mixlora import MixLoraLayer

VOCABULARY = 320


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Give every adapter in `model` an effect, and routers that tell instances apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "mixlora_" in name:
            spread = 4.0 if "router" in name or "cfs" in name else scale
            drawn = torch.randn(parameter.shape, generator=generator) * spread / parameter.shape[-1] ** 0.5
            parameter.data.copy_(drawn)
    return model


def layers(model: nn.Module) -> dict[str, MixLoraLayer]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixLoraLayer)}


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
