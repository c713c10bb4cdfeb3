"""Adapters that one stack has trained, loaded on another; `scripts/test_stacks.sh` runs it in each stack's environment.

MIXLORA_EXCHANGE is the folder that the stacks share, MIXLORA_STACK the name of the one that runs: first every stack
trains an adapter (`-k trains`), then every stack loads them all (`-k load`).
"""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from llava_mixlora.adapter_folder import base_model_of, read_non_lora_trainables
from llava_mixlora.loading import load_for_inference

from ..end_to_end.training import ALONE, train, write_inputs
from ..tiny import layers

if "MIXLORA_EXCHANGE" not in os.environ:
    pytest.skip("run by scripts/test_stacks.sh", allow_module_level=True)

SHARED, STACK = Path(os.environ["MIXLORA_EXCHANGE"]), os.environ["MIXLORA_STACK"]
ROUTINGS = {"ifs_cfs": [], "ifs": ["--mixlora_routing=ifs"], "paper": ["--mixlora_preset=paper"]}
FLAGS = [
    *("--mixlora_enable=True", "--mixlora_num_factors=6", "--lora_alpha=64", "--max_steps=4", "--save_strategy=no"),
    *("--optim=adamw_torch", "--learning_rate=0.05", "--per_device_train_batch_size=4"),
]


def load(folder):
    """The adapter on its base in float32: transformers 4.37 would keep the positions of a float16 model in float16."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    base = LlavaLlamaForCausalLM.from_pretrained(base_model_of(folder), config=AutoConfig.from_pretrained(folder))
    base.get_vision_tower().load_model()
    base.load_state_dict(read_non_lora_trainables(folder), strict=False)
    return PeftModel.from_pretrained(base, str(folder)).float().eval()


def answer(folder):
    """Logits about two pictures, and what is generated about them."""
    model = load(folder)
    assert len(layers(model)) == 14
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 12), generator=generator)
    ids[:, 3] = -200
    images = torch.rand(2, 3, 16, 16, generator=generator)
    model.get_base_model().generation_config.eos_token_id = None
    with torch.inference_mode():  # transformers 4.37 begins with a token more
        logits = model(input_ids=ids, images=images).logits
        tokens = model.generate(
            ids, images=images, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
        )
    return {"logits": logits.contiguous(), "tokens": tokens[:, -8:].contiguous()}


@pytest.fixture(scope="module")
def inputs(_llava, clip_folder, tokenizer_folder):
    """What all stacks train on; the first one writes it."""
    flags = SHARED / "flags.txt"
    if not flags.is_file():
        shutil.copytree(clip_folder, SHARED / "clip")
        answers = ["red", "green", "blue", "circle"]
        base = copy.deepcopy(_llava)
        base.config.mm_vision_tower = str(SHARED / "clip")
        written = write_inputs(SHARED, base, SHARED / "clip", tokenizer_folder, answers)
        flags.write_text("\n".join(written))
    return flags.read_text().splitlines()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_stack_trains_an_adapter(patched, inputs, routing):
    output = SHARED / f"{STACK}-{routing}-mixlora"
    train(ALONE, inputs, output, *FLAGS, *ROUTINGS[routing])
    save_file(answer(output), output / "answer.safetensors")


def test_adapters_of_all_stacks_load_here_with_equal_logits(patched):
    adapters = sorted(SHARED.glob("*-mixlora"))
    assert len(adapters) >= len(ROUTINGS) and len(adapters) % len(ROUTINGS) == 0
    for folder in adapters:
        expected, found = load_file(folder / "answer.safetensors"), answer(folder)
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=5e-5, msg=f"{folder}")
        assert torch.equal(found["tokens"], expected["tokens"])
        _, model, _ = load_for_inference(folder)
        assert len(layers(model)) == 14
    different = {
        routing: load_file(SHARED / f"{STACK}-{routing}-mixlora" / "answer.safetensors") for routing in ROUTINGS
    }
    assert not torch.allclose(different["ifs"]["logits"], different["paper"]["logits"], atol=1e-3)
