"""Upstream's training in a real process: MixLoRA and upstream's own LoRA. For launchers see test_many_processes.py."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

RUN = ["run", "-m", "llava.train.train"]
ANSWER = "red"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """A random LLaVA with a tokenizer, and eight pictures with a question each, as flags of llava.train.train."""
    place = tmp_path_factory.mktemp("inputs")
    _llava.save_pretrained(place / "llava")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, place / "llava")
    samples = []
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 255 - 30 * number)).save(place / f"{number}.png")
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", ANSWER)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (place / "train.json").write_text(json.dumps(samples))
    flags = {
        "model_name_or_path": place / "llava",
        "version": "llava_v1",
        "data_path": place / "train.json",
        "image_folder": place,
        "vision_tower": clip_folder,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "max_steps": 2,
        "learning_rate": 1.0,
        "optim": "sgd",  # Adam would make full steps of what is rounding noise in a gradient
        "model_max_length": 256,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "lora_r": 2,
        "lora_dropout": 0.0,  # its draws differ between one process and two
        "use_cpu": True,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def train(launcher, inputs, output, *flags):
    words = [*launcher, *inputs, "--output_dir", str(output), *flags]
    alone = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, env={**os.environ, **alone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(output / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The adapter of one process whose batch is all the data, in whatever order, and the folder it lies in."""
    output = tmp_path_factory.mktemp("alone") / "llava-mixlora"
    flags = ["--mixlora_enable", "True", "--mixlora_num_factors=4", "--per_device_train_batch_size=8"]
    return train([sys.executable, "-m", "llava_mixlora", *RUN], inputs, output, *flags), output


def test_one_run_leaves_what_upstreams_lora_runs_leave(alone):
    adapter, output = alone
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "MIXLORA"
    assert (output / "config.json").is_file() and (output / "non_lora_trainables.bin").is_file()
    assert len({name.rsplit(".", 1)[0] for name in adapter}) == 14  # seven linear layers in each of two decoder layers


def test_routers_move_when_they_learn_and_stay_when_not(inputs, tmp_path):
    launcher = [sys.executable, "-m", "llava_mixlora", *RUN]
    flags = ["--mixlora_enable=True", "--mixlora_num_factors=4", "--per_device_train_batch_size=8"]
    flags += ["--optim=adamw_torch", "--learning_rate=0.01"]
    frozen = ["--mixlora_router_gradient=none"]
    # B starts at zero, so the routers' first gradient comes with the second step.
    one, three = (train(launcher, inputs, tmp_path / n, *flags, f"--max_steps={n}") for n in ("1", "3"))
    fixed_one, fixed_three = (
        train(launcher, inputs, tmp_path / f"fixed{n}", *flags, *frozen, f"--max_steps={n}") for n in ("1", "3")
    )
    routers = [name for name in one if "router" in name or "cfs" in name]
    assert routers
    assert all(not torch.equal(one[name], three[name]) for name in routers)
    assert all(torch.equal(fixed_one[name], fixed_three[name]) for name in routers)


def test_plain_lora_is_upstreams_own(inputs, tmp_path, patched):
    output = tmp_path / "llava-lora"
    flags = ["--lora_enable=True", "--per_device_train_batch_size=8"]
    adapter = train([sys.executable, "-m", "llava_mixlora", *RUN], inputs, output, *flags)
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert adapter and not any("mixlora" in name for name in adapter)

    from llava.model.builder import load_pretrained_model
    from peft import PeftModel

    base = inputs[0].split("=")[1]
    _, merged, _, _ = load_pretrained_model(str(output), base, "llava-lora", device="cpu")
    assert not isinstance(merged, PeftModel)
