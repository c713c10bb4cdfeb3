"""PEFT knows MIXLORA once the package is imported."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftType, mapping
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from llava_mixlora import MixLoraConfig, MixLoraModel
from llava_mixlora.method.registration import MIXLORA, register


def test_enum_has_a_real_member():
    assert PeftType.MIXLORA is PeftType("MIXLORA") is PeftType["MIXLORA"] is MIXLORA
    assert MIXLORA in list(PeftType) and MIXLORA == "MIXLORA" and isinstance(MIXLORA, PeftType)
    assert copy.deepcopy(MIXLORA) is pickle.loads(pickle.dumps(MIXLORA)) is MIXLORA


def test_tables_lead_to_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MIXLORA] is MixLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MIXLORA] is MixLoraModel
    assert getattr(mapping, "PEFT_TYPE_TO_PREFIX_MAPPING", {MIXLORA: "mixlora_"})[MIXLORA] == "mixlora_"


def test_registering_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
    register(MixLoraConfig, MixLoraModel)
    assert (dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before


def test_other_methods_are_untouched():
    assert PeftType.LORA == "LORA" and PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA].__name__ == "LoraConfig"


@pytest.mark.slow
def test_importing_the_package_patches_nothing():
    program = (
        "import sys, peft; original = peft.get_peft_model; import llava_mixlora;"
        "assert peft.get_peft_model is original and not any(m.split('.')[0] == 'llava' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.1.2"), ("peft", "0.12.0")], ids=["torch of LLaVA's metadata", "peft"]
)
def test_versions_that_cannot_work_are_named_with_the_remedy(package, version):
    program = (
        "import importlib.metadata as m, torch, transformers, peft; real = m.version;"
        f"m.version = lambda name: '{version}' if name == '{package}' else real(name);"
        f"torch.__version__ = m.version('torch'); import llava_mixlora.method.registration"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {package} {version}: expected ") and "pip install" in last
