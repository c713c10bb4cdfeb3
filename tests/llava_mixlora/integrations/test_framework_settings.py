"""What frameworks' settings make of a configuration; `tests/end_to_end/test_frameworks.py` runs the frameworks."""

import importlib
import importlib.util

import pytest
from peft import LoraConfig

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.integrations.framework_settings import KNOWN, check_continues, make_config, refuse

OF_LORA = {"r": 2, "lora_alpha": 8, "lora_dropout": None, "target_modules": None, "task_type": "CAUSAL_LM"}
FRAMEWORKS = {
    "axolotl": ("axolotl", "axolotl"),
    "ms_swift": ("swift", "ms-swift"),
    "llamafactory": ("llamafactory",) * 2,
}


def test_a_framework_s_settings_for_lora_hold_where_mixlora_s_say_nothing():
    config = make_config({"num_factors": 8, "lora_alpha": 64}, OF_LORA)
    assert (config.num_factors, config.r, config.lora_alpha, config.task_type) == (8, 2, 64, "CAUSAL_LM")
    assert config.lora_dropout == MixLoraConfig().lora_dropout
    assert (
        make_config(None, OF_LORA)
        == make_config({}, OF_LORA)
        == MixLoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM")
    )


def test_a_preset_may_be_named():
    assert make_config({"preset": "paper", "num_factors": 8}, OF_LORA) == MixLoraConfig.paper(
        num_factors=8, r=2, lora_alpha=8, task_type="CAUSAL_LM"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_factros": 8}, "mixlora.num_factros: no such setting; did you mean num_factors? There are: preset, "),
        ({"peft_type": "LORA"}, "mixlora.peft_type: no such setting; "),
        ({"preset": "papers"}, "mixlora.preset='papers': expected one of 'paper', 'paper_formulas'"),
        ({"routing": "x"}, "routing='x': expected one of"),
        ([1], "mixlora=[1]: expected settings by name"),
    ],
)
def test_what_cannot_be_is_one_line(settings, expected):
    with pytest.raises(MixLoraError) as error:
        make_config(settings, OF_LORA)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_every_known_setting_is_a_field_of_the_configuration():
    made = MixLoraConfig()
    assert {name for name in KNOWN if not hasattr(made, name)} == {"preset"}
    assert {"num_factors", "router_scope", "tasks", "target_modules"} <= set(KNOWN)


def test_what_is_for_lora_alone_is_refused_where_it_is_set():
    refuse({"use_dora": False, "loraplus_lr_ratio": None, "patterns": {}})
    with pytest.raises(MixLoraError, match="use_dora=True: is for LoRA alone"):
        refuse({"use_rslora": False, "use_dora": True})


def test_training_goes_on_with_the_form_that_the_adapter_has(tmp_path):
    MixLoraConfig(num_factors=8, target_modules=["b", "a"]).save_pretrained(tmp_path / "ours")
    LoraConfig().save_pretrained(tmp_path / "lora")
    check_continues(None, tmp_path / "ours")
    check_continues({"num_factors": 8, "target_modules": ["a", "b"]}, tmp_path / "ours")
    with pytest.raises(MixLoraError, match="mixlora.num_factors=16, but .*ours was trained with 8"):
        check_continues({"num_factors": 16}, tmp_path / "ours")
    with pytest.raises(MixLoraError, match="lora: is no MIXLORA adapter"):
        check_continues({}, tmp_path / "lora")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_without_its_framework_a_module_tells_what_to_install(name):
    module, package = FRAMEWORKS[name]
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    with pytest.raises(ImportError, match=f"{package} is missing here; run: pip install --upgrade {package}"):
        importlib.import_module(f"llava_mixlora.integrations.{name}")
