"""What several tests do to the tiny models of conftest.py."""

import importlib.util
import resource
from contextlib import contextmanager

import peft
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn

from llava_mixlora import MixLoraConfig, MixLoraError, MixLoraLayer
from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES

VOCABULARY = 320
newer_peft = pytest.mark.skipif(not hasattr(peft.utils, "register_peft_method"), reason="PEFT 0.13 has no such feature")
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

GPU_WANTED = not torch.cuda.is_available() and importlib.util.find_spec("transformers.quantizers") is None
quantizes_on_cpu = pytest.mark.skipif(GPU_WANTED, reason="transformers 4.37 quantizes on a GPU only")
deepspeed_on_cpu = pytest.mark.skipif(GPU_WANTED, reason="accelerate 0.21 runs DeepSpeed on GPUs only")


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Give every adapter in `model` an effect, and routers that tell instances apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "mixlora_" in name:
            spread = 4.0 if "router" in name or "cfs" in name else scale
            drawn = torch.randn(parameter.shape, generator=generator) * spread / parameter.shape[-1] ** 0.5
            parameter.data.copy_(drawn)
    return model


def paper_form(**options) -> MixLoraConfig:
    """A configuration in the paper's form, but for `options`: two routers, on the prompt's hidden states in each layer.

    What a layer's own input decides is the hardest to keep the same, and saved adapters that name no form are so.
    """
    return MixLoraConfig(**{"pairing": "rank", "router_scope": "prompt", "router_input": "hidden", **options})


def layers(model: nn.Module) -> dict[str, MixLoraLayer]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixLoraLayer)}


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def draw_pictures(place, count):
    """Pictures `0.png`, `1.png`, ... of 16x16 pixels, from blue to red."""
    for number in range(count):
        strength = 255 * number // count
        Image.new("RGB", (16, 16), (strength, 0, 255 - strength)).save(place / f"{number}.png")


def plain(folder):
    """The LLaVA in a checkpoint folder, without its vision tower."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM.from_pretrained(folder)


def write_adapter(base, folder, trained=True, one_route=False, **form):
    """What upstream's train() writes after a MixLoRA run on `base`; the projector is trained too.

    `form`: further fields of the adapter's configuration.
    """
    from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL

    options = {"target_modules": LINEAR_LAYERS, "exclude_modules": NOT_THE_LANGUAGE_MODEL, "task_type": "CAUSAL_LM"}
    model = get_peft_model(plain(base), paper_form(r=2, num_factors=6, lora_alpha=8, **options, **form))
    randomise(model, scale=0.3)
    if one_route:
        for name, parameter in model.named_parameters():
            if "router" in name or "cfs" in name:
                parameter.data.zero_()
    for seed in range(3 if trained else 0):
        ids = random_ids(4, 12, seed=seed)
        model.train()(input_ids=ids, labels=ids)
    projector = {n: p.detach() + 0.1 for n, p in model.named_parameters() if "mm_projector" in n and "lora" not in n}
    assert len(projector) == 4
    model.config.tune_mm_mlp_adapter = model.config.freeze_mm_mlp_adapter = False
    model.config.save_pretrained(folder)
    model.save_pretrained(folder)
    torch.save(projector, folder / NON_LORA_TRAINABLES)
    return folder


def message_of(function, *args, **kwargs):
    """The one line that calling it raises."""
    with pytest.raises(MixLoraError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextmanager
def no_room(size):
    """Let no file of this process grow beyond `size` bytes, which fails as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
