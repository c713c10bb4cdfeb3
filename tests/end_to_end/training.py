"""How end-to-end tests start upstream's training: in processes of their own, with one thread each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from ..tiny import draw_pictures

SCRIPTS = Path(__file__).parents[2] / "scripts"
RUN = ["run", "-m", "llava.train.train"]
PLUGIN = [sys.executable, "-m", "llava_mixlora"]
ALONE = [*PLUGIN, *RUN]

PAPER_FORM = ["--mixlora_pairing=rank", "--mixlora_router_scope=prompt", "--mixlora_router_input=hidden"]
"""Where questions are all alike, routers on their words have nothing to learn."""


def write_inputs(place, llava, clip_folder, tokenizer_folder, answers):
    """Model, tokenizer, and a picture with a question for each answer, in `place`; returns what all runs are told."""
    llava.save_pretrained(place / "llava")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, place / "llava")
    draw_pictures(place, len(answers))
    samples = []
    for number, answer in enumerate(answers):
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", answer)]
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
        "model_max_length": 256,
        "report_to": "none",
        "lora_r": 2,
        "lora_dropout": 0.0,  # its draws differ between one process and two
        "use_cpu": True,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def train(launcher, inputs, output, *flags, cwd=None):
    """Run it to its end; returns the adapter's tensors."""
    words = [*launcher, *inputs, "--output_dir", str(output), *flags]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(output / "adapter_model.safetensors")


def environment():
    """One thread per process, so that a run can be repeated to the bit; DeepSpeed on the CPU.

    What DeepSpeed compiles stays in the environment that runs the tests, or where `TESTS_COMPILED` says, which lets
    stacks with the same torch share it: a lock that a killed process has left in the user's cache would let them wait
    for ever.
    """
    chosen = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    compiled = os.environ.get("TESTS_COMPILED") or str(Path(sys.prefix) / "torch_extensions")
    return {**os.environ, **chosen, "TORCH_EXTENSIONS_DIR": compiled}


def program(name):
    """A console script of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))
