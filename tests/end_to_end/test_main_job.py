"""`scripts/finetune_mixlora.sh` and `finetune_mixlora_qlora.sh` as a user runs them, with a few steps (`TRIAL=1`)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "finetune_mixlora.sh"
QLORA_SCRIPT = ROOT / "scripts" / "finetune_mixlora_qlora.sh"
MERGE_SCRIPT = ROOT / "scripts" / "merge_mixlora.sh"
EVAL_SCRIPT = ROOT / "scripts" / "eval_mixlora.sh"
GPU_SCRIPT = ROOT / "scripts" / "benchmark_gpu.sh"
MME_SCRIPT = ROOT / "scripts" / "eval_mme.sh"
TASKS = 12
ONE_STEP = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
ONE_STEP += ["--dataloader_num_workers", "0"]
CACHED = (
    "1/4 pictures and questions: cached",
    "2/4 vision tower: cached",
    "3/4 tokenizer: cached",
    "4/4 base model: cached",
)


def environment(place):
    chosen = {"TRIAL": "1", "CACHE_DIR": str(place / "cache"), "OUTPUT_DIR": str(place / "llava-v1-out")}
    return {**os.environ, **chosen, "OMP_NUM_THREADS": "1"}


def finetune(place, *words, script=SCRIPT, **variables):
    return subprocess.run(
        ["bash", str(script), *words],
        env={**environment(place), **variables},
        capture_output=True,
        text=True,
        cwd=place,  # as if called from anywhere
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A place in which the script has run once, and what it printed."""
    place = tmp_path_factory.mktemp("job")
    done = finetune(place, "ifs_cfs", "8", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout


@pytest.fixture(scope="module")
def loaded(finished, patched):
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(finished[0] / "llava-v1-out"), None, "llava-v1-out", device="cpu")


def test_output_holds_adapter_results_and_pictures(finished):
    out = finished[0] / "llava-v1-out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_factors"], config["r"]) == ("MIXLORA", 8, 2)
    assert all("mixlora_" in name for name in load_file(out / "adapter_model.safetensors"))
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava_llama"
    projector = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert projector and all("mm_projector" in name for name in projector)
    for picture in ("contact_sheet.png", "loss_curve.png", "factor_usage.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_results_report_every_task_before_and_after(finished):
    place, printed = finished
    results = json.loads((place / "llava-v1-out" / "results.json").read_text())
    assert set(results) == {"tasks", "mean_before", "mean_after", "seconds", "trainable_parameters", "machine"}
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


def test_both_loaders_give_identical_logits(finished, loaded):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from peft import PeftModel
    from transformers import AutoConfig

    from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables

    out = finished[0] / "llava-v1-out"
    tokenizer, model, _, _ = loaded
    config = AutoConfig.from_pretrained(out)
    folder = finished[0] / "cache" / "llava-v1-tiny"
    base = LlavaLlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float16)
    base.get_vision_tower().load_model()
    base.load_state_dict(read_non_lora_trainables(out), strict=False)
    other = PeftModel.from_pretrained(base, out).eval()
    input_ids = torch.cat([torch.tensor([[1, -200]]), tokenizer("what color is it?", return_tensors="pt").input_ids], 1)
    images = torch.rand(1, 3, 64, 64).half()
    with torch.inference_mode():
        ours, theirs = (m(input_ids=input_ids, images=images).logits for m in (model, other))
    assert torch.equal(ours, theirs)


def test_upstreams_cli_answers(finished):
    place, _ = finished
    done = ask_cli(place, place / "llava-v1-out", "-m", "llava_mixlora", "run")
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout and done.stdout.rstrip().endswith("exit...")


def ask_cli(place, model, *plugin):
    """One question to upstream's command line."""
    image = next((place / "cache" / "data" / "images").glob("shape-heldout-*.png"))
    words = ["--model-path", str(model), "--image-file", str(image), "--device", "cpu", "--max-new-tokens", "4"]
    return subprocess.run(
        [sys.executable, *plugin, "-m", "llava.serve.cli", *words],
        input="what color is the shape?\n\n",
        capture_output=True,
        text=True,
    )


def test_merge_script_makes_a_checkpoint_that_answers_without_the_plugin(finished, tmp_path):
    place, _ = finished
    base, data, merged = place / "cache" / "llava-v1-tiny", place / "cache" / "data", tmp_path / "llava-v1-merged"
    words = ["--model-path", place / "llava-v1-out", "--model-base", base, "--save-model-path", merged]
    words += ["--calibration", data / "train.json", "--image-folder", data / "images", "--samples", "24"]
    words += ["--version", "llava_v1"]
    done = subprocess.run(["bash", str(MERGE_SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same token" in done.stdout
    assert json.loads((merged / "merge_report.json").read_text())["samples"] == {"calibration": 22, "held out": 2}
    assert not any("mixlora" in name for name in load_file(merged / "model.safetensors"))
    done = ask_cli(place, merged)
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout


def test_eval_script_scores_what_the_job_reports(finished):
    place, _ = finished
    out, data = place / "llava-v1-out", place / "cache" / "data"
    words = [out, data / "heldout.json", "--image-folder", data / "images", "--limit", "3", "--max-new-tokens", "16"]
    done = subprocess.run(["bash", str(EVAL_SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((out / "results" / "heldout" / "scores.json").read_text())
    reported = json.loads((out / "results.json").read_text())["tasks"]
    assert {name: row["exact"] for name, row in scores["tasks"].items()} == {n: r["after"] for n, r in reported.items()}


def test_mme_script_gives_the_totals_of_mme(finished, tmp_path):
    place, _ = finished
    picture = next((place / "cache" / "data" / "images").glob("shape-heldout-*.png"))
    for subtask in ("existence", "code_reasoning"):
        (tmp_path / subtask).mkdir()
        shutil.copy(picture, tmp_path / subtask / "1.png")
        (tmp_path / subtask / "1.txt").write_text("Is there a circle?\tYes\nIs there a dog?\tNo\n")
    words = [str(place / "llava-v1-out"), str(tmp_path)]
    done = subprocess.run(["bash", str(MME_SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **perception** |" in done.stdout and "| **cognition** |" in done.stdout
    assert "mme" in json.loads((place / "llava-v1-out" / "results" / "mme" / "scores.json").read_text())
    refused = subprocess.run(["bash", str(MME_SCRIPT)], capture_output=True, text=True)
    assert refused.returncode == 1 and "expected MODEL and MME_FOLDER" in refused.stderr


def study(place, *words):
    places = ["--cache", place / "cache", "--results", place / "results", "--notes", place / "notes.json"]
    command = [sys.executable, "-m", "playground.studies.study", *words, "--trial", *map(str, places)]
    return subprocess.run(command, env=environment(place), capture_output=True, text=True, cwd=ROOT)


def test_study_keeps_what_it_has_measured_and_ends_with_table_and_picture(finished):
    place, _ = finished
    done = study(place, "run", "--only", "r=16")
    assert done.returncode == 0, done.stderr
    single, lora = json.loads((place / "results" / "study.json").read_text())["cells"]
    assert (single["row"], lora["row"], lora["r"]) == ("one LoRA per task", "LoRA", 16)
    for cell in (single, lora):
        assert list(cell["seeds"]) == ["0", "1", "2"] and len(cell["by_task"]) == TASKS - 1
    assert "zero_shot_mean" in lora and "zero_shot_mean" not in single
    assert (place / "results" / "study.png").read_bytes().startswith(b"\x89PNG")
    measured = (place / "notes.json").read_text()
    shown = study(place, "show")
    assert "| LoRA | " in shown.stdout and shown.stdout in done.stdout
    again = study(place, "run", "--only", "r=16")
    assert again.returncode == 0 and (place / "notes.json").read_text() == measured


def test_study_names_a_choice_of_no_cell(finished):
    done = study(finished[0], "--only", "DoRA")
    assert done.returncode == 1  # bitsandbytes may speak first, of what the processor could do
    assert done.stderr.splitlines()[-1].startswith("error: --only DoRA: expected a part of names")


def test_run_interrupted_while_training_goes_on_with_training(finished):
    place, _ = finished
    output = place / "llava-v1-interrupted"
    interrupt_when(place, output, "Fine-tuning with MixLoRA", wait=1)
    assert not (output / "results.json").exists()
    done = finetune(place, "ifs", "4", "2", OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line in done.stdout for line in CACHED)
    assert "Fine-tuning with MixLoRA" in done.stdout
    assert (output / "results.json").exists()


def test_run_interrupted_while_answering_does_not_train_again(finished):
    place, _ = finished
    output = place / "llava-v1-late"
    interrupt_when(place, output, "Asking the fine-tuned model", wait=0)
    done = finetune(place, "ifs", "4", "2", OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done by the interrupted run" in done.stdout
    assert (output / "results.json").exists()


def interrupt_when(place, output, line, wait):
    """Start the script, and kill it and all its children `wait` seconds after it has printed `line`."""
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "ifs", "4", "2"],
        env={**environment(place), "OUTPUT_DIR": str(output), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert any(line in printed for printed in process.stdout), "the script ended before it printed the line"
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


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


def test_your_own_model_and_data_train_through_the_same_script(finished, tmp_path):
    place, _ = finished
    done = finetune(
        place,
        *("ifs", "4", "2", *ONE_STEP, "--evaluation_strategy", "no"),
        **own_model(place),
        OUTPUT_DIR=str(tmp_path / "own"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["lora_alpha"] == 8
    shutil.rmtree(tmp_path / "own")


def test_qlora_script_does_the_same_job_on_4_bit_weights(finished):
    place, _ = finished
    output = place / "llava-v1-qlora"
    done = finetune(place, "ifs_cfs", "8", "2", script=QLORA_SCRIPT, OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line in done.stdout for line in CACHED)
    results, sibling = (json.loads((o / "results.json").read_text()) for o in (output, place / "llava-v1-out"))
    assert results.keys() == sibling.keys() and results["tasks"].keys() == sibling["tasks"].keys()
    assert results["trainable_parameters"] == sibling["trainable_parameters"]
    assert results["mean_before"] == sibling["mean_before"]
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    flags = json.loads((output / "playground_run.json").read_text())["settings"]["flags"]
    assert flags[:2] == ["--bits", "4"]


def test_qlora_script_trains_your_own_model_and_your_flags_win(finished, patched, tmp_path):
    place, _ = finished
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


# --- scripts/benchmark_gpu.sh


def test_what_a_gpu_measures_can_be_tried_without_one(finished):
    place, _ = finished
    output = place / "llava-mixlora-gpu"
    done = finetune(place, "speed", "qlora", "attention", script=GPU_SCRIPT, OUTPUT_DIR=str(output))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {file.stem: json.loads(file.read_text()) for file in (output / "results").iterdir()}
    assert set(found) == {"benchmark_gpu", "qlora_gpu", "attention_gpu"}
    assert len(found["benchmark_gpu"]["taken"]) == 4
    assert len(found["qlora_gpu"]["tasks"]) == TASKS and found["qlora_gpu"]["machine"]["device"]
    assert len(found["attention_gpu"]["losses"]["train_mem"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this would measure for hours")
def test_measuring_a_gpu_needs_one(tmp_path):
    done = finetune(tmp_path, script=GPU_SCRIPT, TRIAL="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: PyTorch sees no CUDA GPU")


def test_unknown_step_of_measuring_a_gpu_is_one_line(tmp_path):
    done = finetune(tmp_path, "sped", script=GPU_SCRIPT)
    assert done.returncode == 1 and done.stderr == "error: sped: expected one of speed qlora attention smollm2\n"
