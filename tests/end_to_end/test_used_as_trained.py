"""An adapter that has moved, and models that are not its own: used as in training, or one line says why not."""

import json
import re
import shutil
import subprocess

import pytest

from .training import ALONE, PAPER_FORM, PLUGIN, environment, train, write_inputs

LEARN = ["--per_device_train_batch_size=4", "--optim=adamw_torch", "--max_steps=2", "--save_strategy=no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """`project/`, where base, tower and a trained adapter lie that has no "v1" and no "llava" in its name."""
    project = tmp_path_factory.mktemp("used-as-trained") / "project"
    project.mkdir()
    shutil.copytree(clip_folder, project / "clip")
    flags = write_inputs(project, _llava, clip_folder, tokenizer_folder, 4 * ["red"])
    flags = [flag for flag in flags if not flag.startswith(("--version", "--vision_tower"))]
    form = ["--mixlora_enable=True", "--mixlora_num_factors=4", *PAPER_FORM]
    train(ALONE, [*flags, "--version=v1", "--vision_tower=clip"], project / "mine", *LEARN, *form, cwd=project)
    return project


@pytest.fixture
def copied(place, tmp_path):
    """A copy that a test may change: of the adapter, and of its base."""
    for name in ("mine", "llava", "clip"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("0.png", "train.json"):
        shutil.copy(place / name, tmp_path)
    return tmp_path


def run(*words, cwd, said=""):
    words = [str(word) for word in (*PLUGIN, *words)]
    done = subprocess.run(words, cwd=cwd, input=said, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def line_of(done):
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    return line


def prompt_of(done):
    (prompt,) = re.findall(r"'prompt': (?:'|\")(.*?)(?:'|\"), 'outputs'", done.stdout)
    return prompt


CLI = ["run", "-m", "llava.serve.cli", "--image-file=0.png", "--device=cpu", "--temperature=0", "--max-new-tokens=4"]


def test_record_tells_what_training_used(place):
    record = json.loads((place / "mine" / "adapter_record.json").read_text())
    assert record["conversation"] == "v1" and record["data"]["samples"] == 4
    assert record["base"]["name_or_path"] == str(place / "llava") and record["base"]["fingerprint"]["weights"]
    assert record["vision_tower"]["fingerprint"]["config"]["patch_size"]
    assert record["images"]["mm_projector_type"] == "mlp2x_gelu"


def test_cli_asks_with_the_template_of_training(place):
    done = run(*CLI, "--model-path=mine", "--debug", cwd=place, said="what color?\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert prompt_of(done).startswith("A chat between a curious user and an artificial intelligence assistant.")


def test_eval_asks_with_the_template_of_training_or_as_told(place):
    words = ["eval", "--model-path=mine", "--questions=train.json", "--limit=1", "--max-new-tokens=2"]
    assert run(*words, "--output=scores", cwd=place).returncode == 0
    assert json.loads((place / "scores" / "run.json").read_text())["conversation"] == "v1"
    done = run(*words, "--output=scores-v0", "--conv-mode=llava_v0", cwd=place)
    assert done.returncode == 0 and done.stdout.count("trained with v1") == 1
    assert json.loads((place / "scores-v0" / "run.json").read_text())["conversation"] == "llava_v0"


def test_project_that_has_moved_is_found_from_anywhere(copied):
    file = copied / "mine" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "llava"}))
    file = copied / "mine" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_vision_tower": "clip"}))
    words = ["eval", f"--model-path={copied / 'mine'}", f"--questions={copied / 'train.json'}", "--limit=1"]
    done = run(*words, "--max-new-tokens=2", f"--output={copied / 'scores'}", cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_tower_that_has_moved_is_given_by_its_flag(copied):
    file = copied / "mine" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_vision_tower": "/gone/clip"}))
    line = line_of(run(*CLI, "--model-path=mine", cwd=copied, said="what color?\n"))
    assert "/gone/clip" in line and "--vision-tower" in line
    done = run(*CLI, "--model-path=mine", "--vision-tower=clip", cwd=copied, said="what color?\n")
    assert done.returncode == 0, done.stderr[-2000:]


def test_another_base_is_refused_unless_it_is_meant(copied, llama_folder):
    weights = copied / "llava" / "config.json"
    weights.write_text(json.dumps({**json.loads(weights.read_text()), "rms_norm_eps": 0.1}))
    words = ["eval", "--model-path=mine", f"--model-base={copied / 'llava'}", "--questions=train.json", "--limit=1"]
    words += ["--max-new-tokens=2", "--output=scores"]
    line = line_of(run(*words, cwd=copied))
    assert "rms_norm_eps is 0.1" in line and "--allow-other-base" in line
    assert not (copied / "scores" / "answers.jsonl").exists()
    done = run(*words, "--allow-other-base", cwd=copied)
    assert done.returncode == 0 and "warning: " in done.stdout
    line = line_of(run("merge", "--model-path=mine", "--model-base=llava", "--save-model-path=merged", cwd=copied))
    assert "rms_norm_eps is 0.1" in line and not (copied / "merged").exists()


def test_adapter_is_merged_once(copied):
    merge = ["merge", "--model-path=mine", "--method=lstsq", "--force", "--save-model-path"]
    done = run(*merge, "llava-merged", "--model-base=llava", cwd=copied)
    assert done.returncode == 0, done.stderr[-2000:]
    line = line_of(run(*merge, "llava-twice", "--model-base=llava-merged", cwd=copied))
    assert "llava-merged holds mine already" in line and not (copied / "llava-twice").exists()
    line = line_of(run(*CLI, "--model-path=mine", "--model-base=llava-merged", cwd=copied, said="x\n"))
    assert "llava-merged holds mine already" in line
    done = run(*CLI, "--model-path=llava-merged", "--debug", cwd=copied, said="what color?\n")
    assert prompt_of(done).startswith("A chat between a curious user")


def test_adapter_of_before_loads_as_before_with_one_line(copied):
    (copied / "mine" / "adapter_record.json").unlink()
    done = run(*CLI, "--model-path=mine", "--model-base=llava", cwd=copied, said="what color?\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("has no adapter_record.json") == 1
