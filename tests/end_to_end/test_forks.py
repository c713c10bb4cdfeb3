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


def run_with(fork, tmp_path):
    """Run a script that uses whichever LLaVA is found."""
    (tmp_path / "script.py").write_text("import llava\nprint('ran with', llava.__file__)\n")
    paths = os.pathsep.join(filter(None, [str(fork.parent), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "llava_mixlora", "run", str(tmp_path / "script.py")]
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
