"""The recipes of `playground/recipes`: other trainers learn what upstream's train() learns."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from .training import write_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed"),
]
ANSWERS = ["red", "green", "a circle", "blue square", "red circle", "blue", "a square", "green shape"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
CALM = ["--optim", "sgd", "--learning-rate", "0.1"]  # Adam makes full steps of what is rounding noise in a gradient


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, _llava, clip_folder, exact_tokenizer_folder):
    """A random LLaVA with a row for <image> in its head, and pictures with questions, as flags of the recipes."""
    place = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(4)
    llava = type(_llava)(type(_llava.config)(**{**_llava.config.to_dict(), "vocab_size": 352}))
    write_inputs(place, llava, clip_folder, exact_tokenizer_folder, ANSWERS)
    samples = json.loads((place / "train.json").read_text())
    for sample, question in zip(samples, 2 * ["what color is the shape?", "a circle?", "green?", "between?"]):
        sample["conversations"][0]["value"] = f"<image>\n{question}"
    (place / "train.json").write_text(json.dumps(samples))
    return ["--base", place / "llava", "--data", place / "train.json", "--images", place, "--batch-size", "4"]


def run(inputs, folder, *words):
    command = [sys.executable, "-m", *words, *inputs, "--native", folder / "native", "--output", folder / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    cwd = Path(__file__).parents[2]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def test_trl_learns_from_pictures_what_upstreams_train_learns(inputs, tmp_path):
    """`beside_upstream` trains with `trl_sft`."""
    said = run([*inputs, *CALM], tmp_path, "playground.recipes.beside_upstream", "--steps", "4")
    upstream, native = losses(tmp_path / "out" / "llava-upstream"), losses(tmp_path / "out" / "trl")
    assert len(upstream) == 4 and upstream.std() > 1e-2
    assert torch.allclose(native, upstream, atol=1e-4, rtol=0)
    assert "layers chose each factor equally often: True" in said


def test_dpo_prefers_right_answers(inputs, tmp_path):
    said = run(inputs, tmp_path, "playground.recipes.trl_dpo", "--steps", "6")
    first, last = map(float, re.search(r"wrong answers: (\S+) at first, (\S+) at last", said).groups())
    assert first == 0 < last  # the reference is the model without its adapter
    assert not [file for file in (tmp_path / "out").rglob("adapter_config.json") if file.parent.name == "ref"]


def test_fsdp2_learns_what_one_process_learns(inputs, tmp_path):
    hidden = [*CALM, "--steps", "3", "--router-input", "hidden"]  # the words' centre is each process's own at first
    said = run([*inputs, *hidden], tmp_path / "two", *TORCHRUN, "playground.recipes.trainer_fsdp2")
    run([*inputs, *hidden], tmp_path / "one", "playground.recipes.trainer_fsdp2")
    assert "sharded by FSDP2: True" in said
    two, one = tmp_path / "two" / "out", tmp_path / "one" / "out"
    assert torch.allclose(losses(two), losses(one), atol=1e-4, rtol=0)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    trained = [name for name in expected if "mixlora_stats" not in name]
    assert len(trained) > 14 and all(torch.allclose(found[name], expected[name], atol=1e-4) for name in trained)
    counts = [name for name in expected if name.endswith("mixlora_stats_usage")]
    assert counts and all(torch.equal(found[name], expected[name]) for name in counts)
    from playground.recipes import native_llava

    base, _ = native_llava.load(tmp_path / "two" / "native")
    loaded = PeftModel.from_pretrained(base, two)
    factor = next(name for name in found if name.endswith("mixlora_B"))
    assert torch.equal(loaded.get_parameter(f"{factor}.default"), found[factor])
