"""The further forms of the method through upstream's training, and what is said of task labels that do not fit."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_mixlora.adapters.adapter_folder import read_config
from llava_mixlora.method.task_subsets import task_subsets

from .training import ALONE, PLUGIN, environment, train

FORM = ["--mixlora_enable=True", "--mixlora_num_factors=6", "--mixlora_pairing=same"]
FORM += ["--mixlora_router_scope=instruction", "--mixlora_router_input=words"]
STEPS = ["--max_steps=4", "--per_device_train_batch_size=2", "--optim=adamw_torch", "--learning_rate=0.01"]
TASKS = ["colour", "shape"]


@pytest.fixture(scope="module")
def labelled(inputs, tmp_path_factory):
    """The inputs of all runs, with a task for each sample; the task is told by the question."""
    place = tmp_path_factory.mktemp("labelled")
    (data,) = [flag.partition("=")[2] for flag in inputs if flag.startswith("--data_path=")]
    samples = json.loads(Path(data).read_text(encoding="utf-8"))
    for number, sample in enumerate(samples):
        sample["task"] = TASKS[number % 2]
        question = ["what color is it?", "circle or square is the shape?"][number % 2]
        sample["conversations"][0]["value"] = f"<image>\n{question}"
    (place / "train.json").write_text(json.dumps(samples))
    return [f"--data_path={place / 'train.json'}" if flag.startswith("--data_path=") else flag for flag in inputs]


@pytest.fixture(scope="module")
def adapter(labelled, tmp_path_factory):
    """A run with task labels, by two workers of a DataLoader, and checkpointed."""
    output = tmp_path_factory.mktemp("forms") / "llava-lora"
    flags = [*FORM, *STEPS, "--mixlora_task_loss_weight=0.5", "--dataloader_num_workers=2", "--save_steps=2"]
    train(ALONE, labelled, output, *flags, "--gradient_checkpointing=True", "--save_strategy=steps")
    return output


def refused(*words):
    done = subprocess.run([*map(str, words)], env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "Traceback" not in done.stderr
    return line


def test_run_with_task_labels_trains_each_task_s_factors(adapter):
    config = read_config(adapter)
    assert config.tasks == TASKS and config.pairing == "same" and config.router_input == "words"
    tensors = load_file(adapter / "adapter_model.safetensors")
    chosen = set(task_subsets(2, 6, 2).flatten().tolist())
    factors = [tensor for name, tensor in tensors.items() if name.endswith("mixlora_B")]
    assert factors
    for tensor in factors:  # pool B starts at zero, and only what a task chose has learnt
        assert {e for e in range(6) if tensor[e].any()} <= chosen
    assert any({e for e in range(6) if tensor[e].any()} == chosen for tensor in factors)
    usage = [tensor for name, tensor in tensors.items() if "stats_usage" in name]
    assert all(torch.equal(tensor[0], tensor[1]) and int(tensor[0].sum()) == 4 * 2 * 2 for tensor in usage)
    (words,) = [tensor for name, tensor in tensors.items() if "stats_words" in name]
    assert words[-1] == 4 * 2


def test_what_was_trained_is_inspected_and_merged(adapter, inputs, tmp_path):
    (base,) = [flag.partition("=")[2] for flag in inputs if flag.startswith("--model_name_or_path=")]
    said = subprocess.run([*PLUGIN, "inspect", str(adapter)], env=environment(), capture_output=True, text=True)
    assert said.returncode == 0 and "pairing=same" in said.stdout and "router_input=words" in said.stdout
    words = [*PLUGIN, "merge", "--model-path", str(adapter), "--model-base", base]
    words += ["--save-model-path", str(tmp_path / "llava-merged"), "--steps", "3", "--force"]
    merged = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert merged.returncode == 0, merged.stderr[-2000:]
    assert "static stand-in for" in merged.stdout and "by distillation" in merged.stdout  # from what the run has kept
    assert "right dynamic" in merged.stdout


def test_another_form_does_not_go_on_with_it(adapter, labelled):
    flags = [*STEPS, "--mixlora_enable=True", "--mixlora_num_factors=6", "--mixlora_pairing=rank"]
    line = refused(*ALONE, *labelled, "--output_dir", adapter, *flags)
    assert "pairing=same" in line and "pairing=rank" in line


def test_missing_task_is_named_before_anything_is_loaded(labelled, tmp_path):
    (data,) = [flag.partition("=")[2] for flag in labelled if flag.startswith("--data_path=")]
    samples = json.loads(Path(data).read_text(encoding="utf-8"))
    del samples[3]["task"]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(samples))
    inputs = [f"--data_path={broken}" if flag.startswith("--data_path=") else flag for flag in labelled]
    line = refused(*ALONE, *inputs, "--output_dir", tmp_path / "llava-lora", *FORM, "--mixlora_task_loss_weight=0.5")
    assert "'3'" in line and "task" in line
    assert not any((tmp_path / "llava-lora").iterdir())
