"""Forks of LLaVA: copies of the installed package with small changes, found before it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .training import environment


@pytest.fixture(scope="module")
def installed():
    return Path(importlib.util.find_spec("llava").origin).parent


@pytest.fixture
def fork(installed, tmp_path):
    """Makes a fork whose `file` has `old` replaced."""

    def fork(file, old, new):
        folder = shutil.copytree(installed, tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
        source = (folder / file).read_text()
        assert len(re.findall(old, source)) == 1
        (folder / file).write_text(re.sub(old, new, source))
        return folder

    return fork


def run_with(fork, tmp_path, *words, text="import llava\nprint('ran with', llava.__file__)\n"):
    """Run words of a command line, or a script that uses whichever LLaVA is found."""
    (tmp_path / "script.py").write_text(text)
    paths = os.pathsep.join(filter(None, [str(fork.parent), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "llava_mixlora", "run", *(words or [str(tmp_path / "script.py")])]
    return subprocess.run(words, env={**environment(), "PYTHONPATH": paths}, capture_output=True, text=True)


def message_of(done):
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    assert "Traceback" not in done.stderr
    return line


CHANGES = {
    "renamed function": (
        ("model/builder.py", r"def load_pretrained_model\(", "def load_model("),
        ["llava.model.builder:load_pretrained_model: expected it to exist"],
    ),
    "removed parameter": (
        (
            "model/builder.py",
            r"def load_pretrained_model\(model_path, model_base,",
            "def load_pretrained_model(model_path,",
        ),
        ["llava.model.builder:load_pretrained_model: expected the parameter 'model_base', found: model_path"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_symbol_is_named_with_what_was_expected_and_where_it_comes_from(fork, tmp_path, change):
    edit, expected = CHANGES[change]
    folder = fork(*edit)
    line = message_of(run_with(folder, tmp_path))
    assert all(words in line for words in expected)
    assert f"It comes from {folder}." in line  # and not with the version of the LLaVA that it hides


UNUSED = {
    "more parameters": (
        "train/train.py",
        r"def train\(attn_implementation=None\)",
        "def train(attn_implementation=None, n=1)",
    ),
    "fewer parameters": ("train/train.py", r"def train\(attn_implementation=None\):", "def train():"),
    "no keywords for the class": (
        "model/builder.py",
        r"use_flash_attn=False, \*\*kwargs\):",
        "use_flash_attn=False):\n    kwargs = {}",
    ),
    "no Trainer": ("train/llava_trainer.py", r"class LLaVATrainer\(Trainer\)", "class AnotherTrainer(Trainer)"),
}


@pytest.mark.parametrize("change", UNUSED)
def test_fork_whose_changes_the_run_does_without_runs(fork, tmp_path, change):
    folder = fork(*UNUSED[change])
    done = run_with(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ran with {folder / '__init__.py'}"


TRAIN = ("-m", "llava.train.train", "--mixlora_enable")
FAULTS = {
    "missing dependency, hidden by an except": (
        ("model/llava_arch.py", r"\nimport torch\n", "\nimport a_fork_needs_this\nimport torch\n"),
        TRAIN,
        ["No module named 'a_fork_needs_this'", "model/llava_arch.py, line 18", "install what llava imports as"],
    ),
    "name that is nowhere, at the import of its training": (
        ("train/llava_trainer.py", r"class LengthGroupedSampler\(Sampler\):", "COMBINE = GoneOption\n\\g<0>"),
        TRAIN,
        ["NameError: name 'GoneOption' is not defined", "train/llava_trainer.py, line ", "mend that line"],
    ),
    "name that is nowhere, in train()": (
        ("train/train.py", r"    global local_rank\n\n    parser", "    global local_rank\n    gone\n    parser"),
        ("-m", "llava.train.train"),
        ["NameError: name 'gone' is not defined", "train/train.py, line ", "mend that line"],
    ),
    "training without LoRA": (
        ("train/train.py", r"(?s)    lora_enable: bool = False\n    lora_r: int = 64\n", ""),
        TRAIN,
        ["trains without LoRA", "TrainingArguments has no lora_enable, lora_r, which"],
    ),
    "loader that hides why it fails": (
        (
            "model/builder.py",
            r"(use_flash_attn=False, \*\*kwargs\):)",
            r"\1\n    try:\n        {}['tower']\n    except:\n        raise ValueError(f'{model_path} not supported')",
        ),
        (),
        ["load_pretrained_model of llava", "KeyError: 'tower' (", "builder.py, line ", "OTHER not supported"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_fork_is_one_line_with_its_first_cause_and_place(fork, tmp_path, fault):
    edit, words, expected = FAULTS[fault]
    asking = "from llava.model.builder import load_pretrained_model\nload_pretrained_model('OTHER', None, 'llava')\n"
    done = run_with(fork(*edit), tmp_path, *words, text=asking)
    line = message_of(done)
    assert all(words in line for words in expected), line
    # It hides the installed one, which is what Python does, and is said.
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning: llava, "))
    assert f"{tmp_path / 'llava'}, hides another llava, " in warning


def test_module_that_is_there_and_cannot_be_imported_is_not_called_missing(tmp_path):
    (tmp_path / "part_of_it").mkdir()
    (tmp_path / "part_of_it" / "__init__.py").write_text("import a_fork_needs_this")
    (tmp_path / "part_of_it" / "train.py").write_text("")
    line = message_of(run_with(tmp_path / "part_of_it", tmp_path, "-m", "part_of_it.train"))
    assert "No module named 'a_fork_needs_this'" in line and "no such module" not in line


def test_llava_of_the_current_folder_is_run_as_python_runs_it(tmp_path):
    """By the command as by `python -m`; what an adapter's folder holds is not imported by other commands."""
    (tmp_path / "in_this_folder.py").write_text("print('ran here')")
    command = Path(sys.executable).with_name("llava-mixlora")
    done = subprocess.run(
        [command, "run", "-m", "in_this_folder"], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ran here", done.stderr
