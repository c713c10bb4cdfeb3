"""What the other scripts, upstream's programs and the studies make of the main job's result."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from .main_job import EVAL_SCRIPT, GPU_SCRIPT, MERGE_SCRIPT, MME_SCRIPT, ROOT, TASKS, environment, finetune


@pytest.fixture(scope="module")
def loaded(main_job, patched):
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(main_job[0] / "llava-v1-out"), None, "llava-v1-out", device="cpu")


def test_both_loaders_give_identical_logits(main_job, loaded):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from peft import PeftModel
    from transformers import AutoConfig

    from llava_mixlora.adapters.adapter_folder import read_non_lora_trainables

    out = main_job[0] / "llava-v1-out"
    tokenizer, model, _, _ = loaded
    config = AutoConfig.from_pretrained(out)
    folder = main_job[0] / "cache" / "llava-v1-tiny"
    base = LlavaLlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float16)
    base.get_vision_tower().load_model()
    base.load_state_dict(read_non_lora_trainables(out), strict=False)
    other = PeftModel.from_pretrained(base, out).eval()
    input_ids = torch.cat([torch.tensor([[1, -200]]), tokenizer("what color is it?", return_tensors="pt").input_ids], 1)
    images = torch.rand(1, 3, 64, 64).half()
    with torch.inference_mode():
        ours, theirs = (m(input_ids=input_ids, images=images).logits for m in (model, other))
    assert torch.equal(ours, theirs)


def test_upstreams_cli_answers(main_job):
    place, _ = main_job
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


def test_merge_script_makes_a_checkpoint_that_answers_without_the_plugin(main_job, tmp_path):
    place, _ = main_job
    base, data, merged = place / "cache" / "llava-v1-tiny", place / "cache" / "data", tmp_path / "llava-v1-merged"
    words = ["--model-path", place / "llava-v1-out", "--model-base", base, "--save-model-path", merged]
    words += ["--calibration", data / "train.json", "--image-folder", data / "images", "--samples", "24"]
    words += ["--version", "llava_v1", "--steps", "2"]
    done = subprocess.run(["bash", str(MERGE_SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same token" in done.stdout
    assert json.loads((merged / "merge_report.json").read_text())["samples"] == {"calibration": 19, "held out": 5}
    assert not any("mixlora" in name for name in load_file(merged / "model.safetensors"))
    done = ask_cli(place, merged)
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout


def test_eval_script_scores_what_the_job_reports(main_job):
    place, _ = main_job
    out, data = place / "llava-v1-out", place / "cache" / "data"
    asked = place / "cache" / "questions" / "heldout.json"
    words = [out, asked, "--image-folder", data / "images", "--limit", "3", "--max-new-tokens", "16"]
    done = subprocess.run(["bash", str(EVAL_SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((out / "results" / "heldout" / "scores.json").read_text())
    reported = json.loads((out / "results.json").read_text())["tasks"]
    assert {name: row["exact"] for name, row in scores["tasks"].items()} == {n: r["after"] for n, r in reported.items()}


def test_mme_script_gives_the_totals_of_mme(main_job, tmp_path):
    place, _ = main_job
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


def test_study_keeps_what_it_has_measured_and_ends_with_table_and_picture(main_job):
    place, _ = main_job
    done = study(place, "run", "--only", "r=16")
    assert done.returncode == 0, done.stderr
    cells = json.loads((place / "results" / "study.json").read_text())["cells"]
    assert {(cell["method"], cell["r"]) for cell in cells} == {("LoRA", 16)}
    eleven, books, longer, longest, paraphrased, *_ = cells
    assert (eleven["setting"], books["setting"]) == ("eleven tasks", "8 code books, fixed wording")
    assert [cell["steps"] for cell in (books, longer, longest)] == [2, 10, 20]
    for cell in cells:
        assert list(cell["seeds"]) == ["0", "1", "2"] and len(cell["validation_by_rate"]) >= 2
    assert len(eleven["asked"]["held out"]["by_task"]) == 11 and "zero-shot" in eleven["asked"]
    assert "new wordings" in paraphrased["asked"] and "new wordings" not in books["asked"]
    assert (place / "results" / "study.png").read_bytes().startswith(b"\x89PNG")
    measured = (place / "notes.json").read_text()
    shown = study(place, "show")
    assert "| LoRA, r=16 | " in shown.stdout and shown.stdout in done.stdout
    again = study(place, "run", "--only", "r=16")
    assert again.returncode == 0 and (place / "notes.json").read_text() == measured


def test_study_names_a_choice_of_no_cell(main_job):
    done = study(main_job[0], "--only", "DoRA")
    assert done.returncode == 1  # bitsandbytes may speak first, of what the processor could do
    assert done.stderr.splitlines()[-1].startswith("error: --only DoRA: expected a part of names")


# --- scripts/benchmark_gpu.sh


def test_what_a_gpu_measures_can_be_tried_without_one(main_job):
    place, _ = main_job
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
