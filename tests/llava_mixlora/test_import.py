"""Importing the package where the method cannot be entered into PEFT, in real processes."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from packaging.version import Version

from llava_mixlora.cli import COMMANDS

REASON = "register_peft_method() got an unexpected keyword argument 'prefix'"
# After PEFT has been told of a part, as where it has checked the prefix last.
FAILS_LATE = f"""
import peft.utils, peft.mapping
def register_peft_method(*, name, config_cls, model_cls):
    kind = peft.PeftType[name.upper()]
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_cls
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_cls
    raise TypeError({REASON!r})
peft.utils.register_peft_method = register_peft_method
"""
TRAINS = """
import sys
from llava_mixlora.method.config import MixLoraConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
base = LlamaForCausalLM(LlamaConfig(**sizes))
print("REACHED")
get_peft_model(base, MixLoraConfig(task_type="CAUSAL_LM"))
print("TRAINS")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(importlib.metadata.version("peft")) < Version("0.21"), reason="PEFT 0.13 has no register_peft_method"
    ),
]


@pytest.fixture
def python(tmp_path):
    """Runs Python where PEFT does not take the method; gives the finished process."""
    # When the package is imported, and not at the start of Python: most of what Python starts imports no PEFT.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Breaking(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'llava_mixlora.method.model':\n"
        "            sys.meta_path.remove(self)\n"
        f"            exec({FAILS_LATE!r}, {{}})\n"
        "sys.meta_path.insert(0, Breaking())\n"
    )

    def python(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)

    return python


def test_no_name_can_be_used(python):
    names = ("MixLoraConfig", "MixLoraLayer", "MixLoraModel", "RoutingCallback", "TaskLabels", "share_statistics")
    script = ["import llava_mixlora", "assert not hasattr(llava_mixlora, 'nothing')"]
    for name in names:
        for access in (f"llava_mixlora.{name}", f"exec('from llava_mixlora import {name}')"):
            script += [
                "try:",
                f"    {access}",
                "except ImportError as error:",
                "    print(error)",
                "else:",
                "    raise 1",
            ]
    done = python("-c", "\n".join(script))
    assert done.returncode == 0, done.stderr
    expected = [f"llava_mixlora.{name}: {REASON}; `llava-mixlora doctor` tells more" for name in names for _ in "12"]
    assert done.stdout.splitlines() == expected


def test_program_that_goes_around_the_package_makes_no_model(python):
    done = python("-c", TRAINS)
    assert done.returncode == 1 and "REACHED" in done.stdout and "TRAINS" not in done.stdout, done.stderr


def test_doctor_and_help_start(python):
    shown = python("-m", "llava_mixlora", "--help")
    assert shown.returncode == 0 and "doctor" in shown.stdout
    told = python("-m", "llava_mixlora", "doctor")
    assert told.returncode == 1 and f"cannot be imported: {REASON}" in told.stdout


def test_commands_that_need_the_method_stop_in_one_line(python, tmp_path):
    (tmp_path / "script.py").write_text("print('STARTED')")
    done = python("-m", "llava_mixlora", "run", str(tmp_path / "script.py"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"llava-mixlora: error: {REASON}; `llava-mixlora doctor` tells")
    others = sorted(set(COMMANDS) - {"run", "doctor"})
    done = python("-c", f"from llava_mixlora.cli import main\nprint([main([name]) for name in {others}])")
    assert done.stdout.split() == str([1] * len(others)).split()
    errors = [line for line in done.stderr.splitlines() if line.startswith("llava-mixlora: error: ")]
    assert len(errors) == len(others) and "Traceback" not in done.stderr
