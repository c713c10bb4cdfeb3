"""Upstream's training in a real process: MixLoRA and upstream's own LoRA."""

import json
import subprocess

import pytest
import torch

from .training import ALONE, PAPER_FORM, environment, program, train


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The adapter of one process whose batch is all the data, in whatever order, and the folder it lies in."""
    output = tmp_path_factory.mktemp("alone") / "llava-mixlora"
    flags = ["--mixlora_enable", "True", "--mixlora_num_factors=4", "--per_device_train_batch_size=8"]
    return train(ALONE, inputs, output, *flags), output


def test_one_run_leaves_what_upstreams_lora_runs_leave(alone):
    adapter, output = alone
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "MIXLORA"
    assert (output / "config.json").is_file() and (output / "non_lora_trainables.bin").is_file()
    adapted = {name.rsplit(".", 1)[0] for name in adapter if "stats_words" not in name}
    assert len(adapted) == 14  # seven linear layers in each of two decoder layers


def test_routers_move_when_they_learn_and_stay_when_not(inputs, tmp_path):
    flags = ["--mixlora_enable=True", "--mixlora_num_factors=4", "--per_device_train_batch_size=8", *PAPER_FORM]
    flags += ["--optim=adamw_torch", "--learning_rate=0.01"]
    frozen = ["--mixlora_router_gradient=none"]
    # B starts at zero, so the routers' first gradient comes with the second step.
    one, three = (train(ALONE, inputs, tmp_path / n, *flags, f"--max_steps={n}") for n in ("1", "3"))
    fixed_one, fixed_three = (
        train(ALONE, inputs, tmp_path / f"fixed{n}", *flags, *frozen, f"--max_steps={n}") for n in ("1", "3")
    )
    routers = [name for name in one if "router" in name or "cfs" in name]
    assert routers
    assert all(not torch.equal(one[name], three[name]) for name in routers)
    assert all(torch.equal(fixed_one[name], fixed_three[name]) for name in routers)


def test_plain_lora_is_upstreams_own(inputs, tmp_path, patched):
    output = tmp_path / "llava-lora"
    flags = ["--lora_enable=True", "--per_device_train_batch_size=8"]
    adapter = train(ALONE, inputs, output, *flags)
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert adapter and not any("mixlora" in name for name in adapter)

    from llava.model.builder import load_pretrained_model
    from peft import PeftModel

    base = inputs[0].split("=")[1]
    _, merged, _, _ = load_pretrained_model(str(output), base, "llava-lora", device="cpu")
    assert not isinstance(merged, PeftModel)


def test_train_mem_says_once_that_it_goes_without_flash_attention(inputs, tmp_path):
    output = tmp_path / "llava-mixlora"
    launcher = [program("torchrun"), "--nproc_per_node=2", "--standalone", "-m", "llava_mixlora"]
    words = [*launcher, "run", "-m", "llava.train.train_mem", *inputs, f"--output_dir={output}", "--max_steps=1"]
    done = subprocess.run([*words, "--mixlora_enable=True"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "adapter_model.safetensors").is_file()
    assert done.stdout.count("flash-attn is not installed or sees no GPU: using PyTorch's") == 1
