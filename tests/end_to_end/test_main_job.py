"""`scripts/finetune_mixlora.sh` and `finetune_mixlora_qlora.sh` as a user runs them, with a few steps (`TRIAL=1`)."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from .main_job import CACHED, ONE_STEP, QLORA_SCRIPT, SCRIPT, SETUP_SCRIPT, TASKS, environment, finetune


def test_output_holds_adapter_results_and_pictures(main_job):
    out = main_job[0] / "llava-v1-out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_factors"], config["r"]) == ("MIXLORA", 8, 2)
    assert all("mixlora_" in name for name in load_file(out / "adapter_model.safetensors"))
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava_llama"
    projector = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert projector and all("mm_projector" in name for name in projector)
    for picture in ("contact_sheet.png", "loss_curve.png", "factor_usage.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_card_tells_data_hyperparameters_and_results(main_job):
    place, _ = main_job
    card = (place / "llava-v1-out" / "README.md").read_text()
    data = place / "cache" / "questions" / "train.json"
    assert f"| sha256 of the data | {hashlib.sha256(data.read_bytes()).hexdigest()} |" in card
    assert f"| samples | {len(json.loads(data.read_text()))} |" in card and "| learning_rate | 0.002 |" in card
    results = json.loads((place / "llava-v1-out" / "results.json").read_text())
    means = (results["mean_before"], results["lora"]["mean_after"], results["mean_after"])
    shown = " | ".join(f"**{mean:.1f}%**" for mean in means)
    assert f"| **mean** | **{3 * TASKS}** | {shown} |" in card
    assert "llava-mixlora run -m llava.serve.cli" in card and str(place) not in card
    assert "\npipeline_tag: image-text-to-text\n" in card


def test_results_report_every_task_before_and_after(main_job):
    place, printed = main_job
    results = json.loads((place / "llava-v1-out" / "results.json").read_text())
    assert set(results) == {"tasks", "mean_before", "mean_after", "lora", "seconds", "trainable_parameters", "machine"}
    assert len(results["tasks"]) == TASKS
    for name, row in results["tasks"].items():
        assert set(row) == {"before", "after", "n"} and row["n"] == 3
        assert 0 <= row["before"] <= 100 and 0 <= row["after"] <= 100
        assert name in printed
    adapter = load_file(place / "llava-v1-out" / "adapter_model.safetensors")
    trained = [tensor for name, tensor in adapter.items() if "mixlora_stats" not in name]
    trained += torch.load(place / "llava-v1-out" / "non_lora_trainables.bin", weights_only=True).values()
    assert results["trainable_parameters"] == sum(tensor.numel() for tensor in trained)
    assert f"{results['trainable_parameters']:,}" in printed and "llava.serve.cli" in printed


def test_plain_lora_is_trained_as_long_beside(main_job):
    place, printed = main_job
    results, lora = json.loads((place / "llava-v1-out" / "results.json").read_text()), place / "llava-v1-out-lora"
    assert set(results["lora"]) == {"tasks", "mean_after", "r", "trainable_parameters"}
    assert results["lora"]["tasks"].keys() == results["tasks"].keys() and results["lora"]["r"] == 8
    config = json.loads((lora / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    steps, of_lora = (json.loads((place / name / "trainer_state.json").read_text()) for name in ("llava-v1-out", lora))
    assert steps["global_step"] == of_lora["global_step"] == 4
    trained = [*load_file(lora / "adapter_model.safetensors").values()]
    trained += torch.load(lora / "non_lora_trainables.bin", weights_only=True).values()
    assert results["lora"]["trainable_parameters"] == sum(tensor.numel() for tensor in trained)
    assert (
        "Fine-tuning with a plain LoRA: 4 steps" in printed
        and f"{results['lora']['trainable_parameters']:,}" in printed
    )


def test_interrupted_run_goes_on_with_training_and_does_not_train_again_while_answering(main_job):
    place, _ = main_job
    output = place / "llava-v1-interrupted"
    interrupt_when(place, output, "Fine-tuning with MixLoRA", wait=1)
    assert not (output / "results.json").exists()
    before = interrupt_when(place, output, "Asking the plain LoRA", wait=0)
    assert all(line in before for line in CACHED)
    assert "Fine-tuning with MixLoRA" in before
    done = finetune(place, "ifs", "4", "2", OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done by an earlier run") == 2 and "4 steps" not in done.stdout
    assert (output / "results.json").exists()


def interrupt_when(place, output, line, wait):
    """Kill the script and all its children `wait` seconds after it has printed `line`; returns what it printed."""
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "ifs", "4", "2"],
        env={**environment(place), "OUTPUT_DIR": str(output), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    printed = ""
    while line not in printed:
        read = process.stdout.readline()
        assert read, "the script ended before it printed the line"
        printed += read
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return printed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["ifs_cfs", "4", "8"], "r=8"),
        (["ifs_cfs", "0", "1"], "num_factors=0"),
        (["fis", "16", "4"], "routing='fis'"),
        (["ifs", "many"], "many"),
        (["ifs", "16", "4", "--bits", "3"], "--bits 3"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_built(tmp_path, words, named):
    done = finetune(tmp_path, *words)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and named in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "cache" / "data").exists()


def test_language_model_that_nobody_knows_is_one_line(tmp_path):
    done = finetune(tmp_path, LANGUAGE_MODEL="gpt2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: LANGUAGE_MODEL=gpt2: expected tiny or smollm2; for a model of yours set MODEL\n"


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = finetune(tmp_path, OUTPUT_DIR=str(tmp_path / "file" / "llava-v1-out"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "file" in done.stderr.splitlines()[-1]


def own_model(place):
    """The environment of a user with a model and data of his own, and no GPU."""
    cache = place / "cache"
    return {
        "MODEL": str(cache / "llava-v1-tiny"),
        "DATA_PATH": str(cache / "data" / "train.json"),
        "IMAGE_FOLDER": str(cache / "data" / "images"),
        "VISION_TOWER": str(cache / "tower"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_your_own_model_and_data_train_through_the_same_script(main_job, tmp_path):
    place, _ = main_job
    done = finetune(
        place,
        *("input", "4", "2", *ONE_STEP, "--evaluation_strategy", "no"),
        **own_model(place),
        OUTPUT_DIR=str(tmp_path / "own"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["routing"], config["pairing"]) == (8, "ifs", "rank")
    shutil.rmtree(tmp_path / "own")


def test_qlora_script_does_the_same_job_on_4_bit_weights(main_job):
    place, _ = main_job
    output = place / "llava-v1-qlora"
    done = finetune(place, "ifs", "8", "2", script=QLORA_SCRIPT, OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line in done.stdout for line in CACHED)
    results, sibling = (json.loads((o / "results.json").read_text()) for o in (output, place / "llava-v1-out"))
    assert results.keys() == sibling.keys() and results["tasks"].keys() == sibling["tasks"].keys()
    assert results["trainable_parameters"] == sibling["trainable_parameters"]
    assert results["mean_before"] == sibling["mean_before"]
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    flags = json.loads((output / "playground_run.json").read_text())["settings"]["flags"]
    assert flags[:2] == ["--bits", "4"]


def test_qlora_script_trains_your_own_model_and_your_flags_win(main_job, patched, tmp_path):
    place, _ = main_job
    done = finetune(
        place,
        *("ifs", "4", "2", "--bits", "8", *ONE_STEP),
        script=QLORA_SCRIPT,
        **own_model(place),
        OUTPUT_DIR=str(tmp_path / "own"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used = torch.load(tmp_path / "own" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (used.bits, used.optim) == (8, "adamw_torch")


def test_help_of_the_qlora_script_explains_both():
    done = subprocess.run(["bash", str(QLORA_SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "4-bit weights" in done.stdout and "ROUTING" in done.stdout and "OUTPUT_DIR" in done.stdout


def test_help_of_the_setup_installs_nothing(tmp_path):
    nowhere = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run(["bash", str(SETUP_SCRIPT), "--help"], capture_output=True, text=True, env=nowhere)
    assert done.returncode == 0 and "CONSTRAINTS" in done.stdout
    assert done.stdout.startswith("Installs llava-mixlora") and not done.stdout.rstrip().endswith("{")
    assert not list(tmp_path.iterdir())
