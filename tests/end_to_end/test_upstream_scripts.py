"""Upstream's own scripts (haotian-liu/LLaVA), with their flags, and with `--mixlora_enable True` after them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from llava_mixlora.adapters.adapter_folder import NON_LORA_TRAINABLES

from ..tiny import LINEAR_LAYERS, draw_pictures, plain, write_adapter
from .training import environment

RUN = [sys.executable, "-m", "llava_mixlora", "run"]

# What both scripts end with.
COMMON = """
--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --num_train_epochs 1
--per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
--evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --weight_decay 0.
--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
--gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""

FLAGS = {
    "scripts/v1_5/finetune_lora.sh": """
--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json --version v1
--mm_projector_type mlp2x_gelu --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-4
""",
    "scripts/finetune_qlora.sh": """
--deepspeed /path/to/deepspeed_zero2.json --lora_enable True --bits 4 --version v1 --learning_rate 2e-5
--pretrain_mm_mlp_adapter mm_projector.bin
""",
}

SUBSTITUTIONS = {
    "--deepspeed": [],  # one process here; DeepSpeed's tests are those of many processes
    "--tf32": ["--use_cpu", "True"],  # a format of GPUs
    "--report_to": ["--report_to", "none"],  # wandb has an account
    "--dataloader_num_workers": ["--dataloader_num_workers", "0"],  # each worker would import torch
    "--model_max_length": ["--model_max_length", "256"],  # of the tiny model
}


@pytest.fixture(scope="module")
def place(llama_folder, tokenizer_folder, clip_folder, tmp_path_factory):
    """What the scripts name: a language model, a projector and data."""
    place = tmp_path_factory.mktemp("scripts")
    shutil.copytree(llama_folder, place / "vicuna")
    shutil.copytree(tokenizer_folder, place / "vicuna", dirs_exist_ok=True)
    torch.manual_seed(5)
    projector = {"model.mm_projector.weight": torch.randn(32, 16), "model.mm_projector.bias": torch.zeros(32)}
    torch.save(projector, place / "mm_projector.bin")
    draw_pictures(place, 32)
    samples = []
    for number in range(32):
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", ["red", "blue circle"][number % 2])]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (place / "train.json").write_text(json.dumps(samples))
    return place


@pytest.fixture
def finetune(place, clip_folder, tmp_path):
    """Run a script's command with more flags; returns the output folder."""

    def finetune(script, *more):
        words = (FLAGS[script] + COMMON).split()
        flags = []
        for flag, value in zip(words[::2], words[1::2]):
            flags += SUBSTITUTIONS.get(flag, [flag, value])
        flags += ["--model_name_or_path", "vicuna", "--data_path", "train.json", "--image_folder", "."]
        flags += ["--vision_tower", clip_folder, "--output_dir", tmp_path / "llava-out"]
        words = [*RUN, "-m", "llava.train.train_mem", *map(str, flags), *more]
        done = subprocess.run(words, cwd=place, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return tmp_path / "llava-out"

    return finetune


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize(
    "more, kind", [((), "LORA"), (("--mixlora_enable", "True"), "MIXLORA")], ids=["LoRA", "MixLoRA"]
)
def test_training_script_trains_what_its_flags_ask_for(finetune, script, more, kind):
    folder = finetune(script, *more)
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = (128, 256) if "v1_5" in script else (64, 16)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == (kind, rank, alpha)
    adapter = load_file(folder / "adapter_model.safetensors")
    adapted = {name.partition("_proj")[0] for name in adapter if "_proj" in name}
    assert len(adapted) == 14  # seven layers in each of two decoder layers
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # zero before training
    assert all(("mixlora_" in name) == (kind == "MIXLORA") for name in adapter)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"][0]["loss"] > 0
    assert (folder / NON_LORA_TRAINABLES).is_file() and (folder / "config.json").is_file()


MERGE_SCRIPT = """
import argparse
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model

parser = argparse.ArgumentParser()
for flag in ("--model-path", "--model-base", "--save-model-path"):
    parser.add_argument(flag, required=True)
given = parser.parse_args()
name = get_model_name_from_path(given.model_path)
tokenizer, model, _, _ = load_pretrained_model(given.model_path, given.model_base, name, device_map="cpu", device="cpu")
for part in (model, tokenizer):
    part.save_pretrained(given.save_model_path)
"""


def merge(place, adapter, base, out):
    """What scripts/merge_lora_weights.py does, which the package does not hold."""
    (place / "merge_lora_weights.py").write_text(MERGE_SCRIPT)
    words = ["--model-path", adapter, "--model-base", base, "--save-model-path", out]
    command = [*RUN, str(place / "merge_lora_weights.py"), *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_merge_script_merges_a_lora_as_before(llava_folder, tmp_path):
    adapter = tmp_path / "llava-lora"
    model = plain(llava_folder)
    kept = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=LINEAR_LAYERS, exclude_modules=".*(mm_|vision_).*", init_lora_weights=False)
    model = get_peft_model(model, config)
    model.config.save_pretrained(adapter)
    model.save_pretrained(adapter)
    torch.save({}, adapter / NON_LORA_TRAINABLES)
    done = merge(tmp_path, adapter, llava_folder, tmp_path / "merged")
    assert done.returncode == 0, done.stderr[-3000:]
    update = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(merged.float(), kept + update, atol=5e-3)  # in float16
    assert update.abs().max() > 0.05


def test_merge_script_is_told_what_merges_a_mixlora(llava_folder, tmp_path):
    adapter = write_adapter(llava_folder, tmp_path / "llava-mixlora", trained=False)
    out = tmp_path / "merged"
    done = merge(tmp_path, adapter, llava_folder, out)
    assert done.returncode == 1 and not out.exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    command = f"llava-mixlora merge --model-path {adapter} --model-base {llava_folder} --save-model-path {out}"
    assert line.endswith(f"run: {command}") and "Traceback" not in done.stderr
