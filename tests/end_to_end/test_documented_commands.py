"""What the README files tell users to type is typed here, in a place that looks like the repository after the main job.

A command that starts a long job, or one that sets an environment up, has a test of its own, which is named below; one
that needs a GPU, or what only a network has, is marked in the text.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .main_job import ROOT

FILES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
NEEDS_A_GPU = "# needs a GPU"
TESTED_BY = {
    "bash scripts/finetune_mixlora.sh": "tests/end_to_end/test_main_job.py",
    "bash scripts/finetune_mixlora_qlora.sh": "tests/end_to_end/test_main_job.py",
    "bash scripts/test.sh": ".ci/run",
    "bash scripts/test_stacks.sh": ".ci/run",
    "bash scripts/test_peft.sh": "scripts/test.sh",
    "bash scripts/test_patches.sh": "tests/without_patches.py",
    "bash scripts/test_frameworks.sh": "tests/end_to_end/test_frameworks.py",
    "bash scripts/test_vllm.sh": "tests/end_to_end/test_serve_vllm.py",
    "python -m playground.plain_peft": "tests/playground/test_plain_peft.py",
    "python -m playground.recipes.beside_upstream": "tests/end_to_end/test_recipes.py",
    "python -m playground.recipes.trl_dpo": "tests/end_to_end/test_recipes.py",
    "python -m playground.recipes.trl_sft": "tests/end_to_end/test_recipes.py",
    "torchrun --nproc_per_node 2 -m playground.recipes.trainer_fsdp2": "tests/end_to_end/test_recipes.py",
    "llava-mixlora run -m lmms_eval": "tests/end_to_end/test_lmms_eval.py",
    "llava-mixlora run -m llava.serve.controller": "tests/end_to_end/test_serving.py",
    "llava-mixlora run -m llava.serve.model_worker": "tests/end_to_end/test_serving.py",
}
"""By how a command begins, the file in which it is run, shortened."""
SHORTENED = {
    "llava-mixlora interference": "--samples 6 --batch-size 2 --layers layers.0 --tasks shape digit",
    "llava-mixlora plot playground/output/llava-v1-tiny-mixlora --": "--samples 3",
    "bash scripts/eval_mixlora.sh": "--limit 1",
    "llava-mixlora eval": "--limit 1",
    "bash scripts/merge_mixlora.sh": "--samples 24 --steps 2",
    "llava-mixlora export-lora": "--samples 24 --steps 2",
}
"""By how a command begins, what is added to it here, so that it takes seconds."""


def blocks(file, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", file.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands():
    """Every command in the README files, as it is written."""
    for file in FILES:
        for block in blocks(file, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield file.relative_to(ROOT), " ".join(line.split())


def beginning(command, table):
    return next((begins for begins in table if command.startswith(begins)), None)


TO_RUN = [
    pytest.param(command, id=f"{file}: {command[:60]}")
    for file, command in dict.fromkeys(commands())
    if NEEDS_A_GPU not in command and beginning(command, TESTED_BY) is None
]


@pytest.fixture(scope="module")
def place(main_job, tmp_path_factory):
    """The repository as it is after the main job, to write into."""
    view = tmp_path_factory.mktemp("repository")
    for entry in ROOT.iterdir():
        if entry.name not in ("playground", ".git", ".venv", ".stacks"):
            (view / entry.name).symlink_to(entry)
    (view / "playground" / "output").mkdir(parents=True)
    for entry in (ROOT / "playground").iterdir():
        if entry.name not in ("cache", "output"):
            (view / "playground" / entry.name).symlink_to(entry)
    done, _ = main_job
    (view / "playground" / "cache").symlink_to(done / "cache")
    adapter = view / "playground" / "output" / "llava-v1-tiny-mixlora"
    shutil.copytree(done / "llava-v1-out", adapter)
    shutil.copytree(done / "llava-v1-out", adapter / "checkpoint-40")  # as a run with --save_steps leaves it
    return view


def environment(place):
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "CACHE_DIR": str(place / "playground" / "cache"),
        "OUTPUT_DIR": str(place / "playground" / "output" / "llava-v1-tiny-mixlora"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("command", TO_RUN)
def test_command_runs(place, command):
    shorter = SHORTENED.get(beginning(command, SHORTENED), "")
    # The scripts are those of the repository itself, which is where they are set up.
    words = f"{command.partition(' #')[0]} {shorter}".replace("bash scripts/", f"bash {ROOT}/scripts/")
    words = words.replace("source scripts/", f"source {ROOT}/scripts/")
    done = subprocess.run(
        ["bash", "-c", words],
        input="what color is the shape?\n\n",  # for the one that talks
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("begins, file", TESTED_BY.items())
def test_command_that_is_run_elsewhere_is_named_there(begins, file):
    assert any(command.startswith(begins) for _, command in commands()), f"{begins}: no README names it any more"
    name = begins.split()[-1].rpartition("/")[2].removesuffix(".sh").rpartition(".")[2]
    assert name in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_in_the_readme_runs(place, file):
    for block in blocks(file, "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=place, env=environment(place), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"


def test_json_in_the_readme_is_data_that_is_read(tmp_path):
    from llava_mixlora.data.conversations import read_conversations

    (example,) = blocks(ROOT / "README.md", "json")
    (tmp_path / "data.json").write_text(example)
    assert read_conversations(tmp_path / "data.json") == json.loads(example)


def headings(file):
    """The anchors of a file's headlines."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(anchors)) == len(anchors), f"{file}: two headlines have the same link"
    return anchors


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{file}: {target}"
        assert not anchor or anchor in headings(linked), f"{file}: {target}"


def test_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    # A package index shows this file alone, where the words for a picture that lies beside it have to do.
    pictures = re.findall(r"!\[([^]]*)\]\((?!https://)", text)
    assert all(len(words.split()) > 5 for words in pictures) and len(pictures) <= 1
