"""What users know of PEFT's LoRA and MixLoRA cannot do is one line that says what can be done."""

import inspect

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel

from llava_mixlora import MixLoraConfig, MixLoraLayer, MixLoraModel

from ...tiny import layers, message_of

OF_LORA_ITSELF = {
    *(
        "corda_init",
        "dora_init",
        "loftq_init",
        "lora_ga_init",
        "mica_init",
        "olora_init",
        "orthogonal_init",
        "pissa_init",
    ),
    *("resolve_lora_variant", "get_peft_config_as_dict"),
}
"""Methods that LoRA calls on itself, most by options of its configuration that MixLoRA's does not have."""


@pytest.fixture
def adapted(llama):
    return get_peft_model(llama, MixLoraConfig(task_type="CAUSAL_LM", r=2, num_factors=4, target_modules=["q_proj"]))


def test_averaging_adapters_is_answered_with_what_can_be_done(adapted):
    adapted.add_adapter("other", MixLoraConfig(r=2, num_factors=4, target_modules=["q_proj"]))
    message = message_of(adapted.add_weighted_adapter, ["default", "other"], [0.5, 0.5], adapter_name="mean")
    assert message.startswith("add_weighted_adapter: ") and "set_adapter([...])" in message and "export-lora" in message
    adapted.base_model.set_adapter(["default", "other"])  # what it says


def test_start_that_is_to_be_taken_off_does_not_exist(adapted):
    assert "never changes its base" in message_of(adapted.subtract_mutated_init, {}, "default")


@pytest.mark.parametrize(
    "name, given", [("set_scale", ("default", 2.0)), ("scale_layer", (2.0,)), ("unscale_layer", ())]
)
def test_scale_is_chosen_when_an_adapter_is_loaded(adapted, name, given):
    (layer, *_) = layers(adapted).values()
    message = message_of(getattr(layer, name), *given)
    assert message.startswith(f"{name}: ") and "config.lora_alpha" in message


def test_fresh_adapter_takes_the_place_of_fresh_parameters(adapted):
    (layer, *_) = layers(adapted).values()
    assert "delete_adapter('default')" in message_of(layer.reset_lora_parameters, "default")


@pytest.mark.parametrize("ours, of_lora", [(MixLoraModel, LoraModel), (MixLoraLayer, LoraLayer)])
def test_every_public_method_of_lora_is_there_or_refused(ours, of_lora):
    public = {name for name, _ in inspect.getmembers(of_lora, callable) if not name.startswith("_")}
    assert {name for name in public if not hasattr(ours, name)} <= OF_LORA_ITSELF


def test_lora_itself_is_as_before(llama):
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], adapter_name="mean")
    assert "mean" in model.peft_config
