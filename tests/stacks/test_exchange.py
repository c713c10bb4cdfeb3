"""Adapters that one stack has trained, loaded on another; `scripts/test_stacks.sh` runs it in each stack's environment.

MIXLORA_EXCHANGE is the folder that the stacks share, MIXLORA_STACK the name of the one that runs: first every stack
trains an adapter (`-k trains`), then every stack loads them all (`-k load`).
"""

import copy
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables
from llava_mixlora.adapters.model_places import base_model_of
from llava_mixlora.inference.loading import load_for_inference

from ..end_to_end.training import ALONE, PLUGIN, train, write_inputs
from ..tiny import layers

if "MIXLORA_EXCHANGE" not in os.environ:
    pytest.skip("run by scripts/test_stacks.sh", allow_module_level=True)

SHARED, STACK = Path(os.environ["MIXLORA_EXCHANGE"]), os.environ["MIXLORA_STACK"]
ROUTINGS = {"ifs_cfs": [], "ifs": ["--mixlora_routing=ifs"], "paper": ["--mixlora_preset=paper"]}
FLAGS = [
    *("--mixlora_enable=True", "--mixlora_num_factors=6", "--lora_alpha=64", "--max_steps=4", "--save_strategy=no"),
    *("--optim=adamw_torch", "--learning_rate=0.05", "--per_device_train_batch_size=4"),
]


def bare(folder, config=None):
    """A LLaVA in float32 with its tower: transformers 4.37 would keep the positions of a float16 model in float16."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    options = {} if config is None else {"config": config}
    model = LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **options)
    model.get_vision_tower().load_model()
    return model.float().eval()


def load(folder):
    """The adapter on its base."""
    base = bare(base_model_of(folder), AutoConfig.from_pretrained(folder))
    base.load_state_dict(read_non_lora_trainables(folder), strict=False)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def questions():
    """Two prompts, and a picture for each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 12), generator=generator)
    ids[:, 3] = -200
    return ids, torch.rand(2, 3, 16, 16, generator=generator)


def ask(model):
    """Logits about both."""
    ids, images = questions()
    with torch.inference_mode():
        return model(input_ids=ids, images=images).logits.contiguous()


def answer(folder):
    """Logits about both, and eight tokens that are generated."""
    model, (ids, images) = load(folder), questions()
    assert len(layers(model)) == 14
    model.get_base_model().generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        tokens = model.generate(ids, images=images, **options)[:, -8:]  # transformers 4.37 begins with one more
    return {"logits": ask(model), "tokens": tokens.contiguous()}


@pytest.fixture(scope="module")
def inputs(_llava, clip_folder, tokenizer_folder):
    """What all stacks train on; the first one writes it."""
    flags = SHARED / "flags.txt"
    with FileLock(SHARED / "flags.lock"):
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


def test_adapter_that_a_stack_trains_is_merged_and_saved(patched, tmp_path):
    folder, merged = SHARED / f"{STACK}-ifs_cfs-mixlora", tmp_path / "llava-merged"
    words = [*PLUGIN, "merge", "--model-path", str(folder), "--save-model-path", str(merged)]
    words += ["--method", "lstsq", "--image-folder", str(tmp_path / "absent"), "--force"]  # as PEFT does
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    saved, again = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    expected = ask(model.merge_and_unload())
    torch.testing.assert_close(ask(bare(merged)), expected, rtol=1e-4, atol=1e-3)  # its weights are in half precision
    assert not torch.allclose(expected, load_file(folder / "answer.safetensors")["logits"], atol=0.02)


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
