"""A LLaVA's adapter loaded by what users know of PEFT, transformers and PyTorch, in processes of their own."""

import subprocess
import sys

import pytest

from ..tiny import write_adapter
from .training import environment

PREPARED = """
import sys, torch
from llava_mixlora import patches
patches.apply()
import llava.model
folder, saved = sys.argv[1:]
"""
ANSWERS = """
tower = model.get_vision_tower()
if not tower.is_loaded:
    tower.load_model()
images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ids = torch.tensor([[1, 5, -200, 7, 8, 9], [1, -200, 30, 31, 32, 33]])
print(model.float().eval().generate(ids, images=images, do_sample=False, max_new_tokens=8).tolist())
"""
BY_LLAVA = """
from llava.model.builder import load_pretrained_model
_, model, _, _ = load_pretrained_model(folder, None, "llava-mixlora", device="cpu", torch_dtype=torch.float32)
from accelerate.hooks import remove_hook_from_module
remove_hook_from_module(model.get_base_model(), recurse=True)  # 4.37 puts some, which no pickle holds
torch.save(model, saved)
"""
BY_PEFT = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(folder)
"""
BY_TORCH = """
model = torch.load(saved, weights_only=False)
"""
BY_TRANSFORMERS = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
"""


@pytest.fixture(scope="module")
def adapter(llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora"), False, router_scope="instruction")


@pytest.fixture(scope="module")
def python(adapter, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved") / "model.pt"

    def python(*parts):
        words = [sys.executable, "-c", "".join(parts), str(adapter), str(saved)]
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)

    return python


@pytest.fixture(scope="module")
def answers(python):
    """What the model that LLaVA's own loader gives answers; it is saved as a pickle too."""
    done = python(PREPARED, BY_LLAVA, ANSWERS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("way", [BY_PEFT, BY_TORCH], ids=["AutoPeftModelForCausalLM", "torch.load"])
def test_model_answers_as_the_one_of_llavas_loader(python, answers, way):
    done = python(PREPARED, way, ANSWERS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == answers


def test_pickle_that_is_used_without_the_patches_says_what_is_missing(python, answers):
    done = python("import sys, torch\nfolder, saved = sys.argv[1:]", BY_TORCH, ANSWERS)
    assert done.returncode == 1 and "call llava_mixlora.patches.apply() first" in done.stderr.splitlines()[-1]


def test_transformers_takes_the_adapter_or_says_who_does(python, answers, adapter):
    done = python(PREPARED, BY_TRANSFORMERS, ANSWERS)
    if done.returncode == 0:  # as transformers 4.37, which loads the base that the adapter names
        assert done.stdout.splitlines()[-1] == answers
        return
    line = done.stderr.splitlines()[-1]
    assert f"MixLoraError: {adapter} holds an adapter, not a whole model" in line
    assert f"AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})" in line
