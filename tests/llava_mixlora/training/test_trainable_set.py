"""A run trains its adapter and LLaVA's projector, and nothing of the base."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from llava_mixlora import MixLoraConfig
from llava_mixlora.training.trainable_set import check_trainable, thaw_beside

from ...tiny import message_of

TARGETS = {"target_modules": r".*layers.*\.(q|v)_proj", "task_type": "CAUSAL_LM"}
CONFIGS = [LoraConfig(r=2, **TARGETS), MixLoraConfig(r=2, num_factors=4, **TARGETS)]


@pytest.fixture(params=CONFIGS, ids=["LoRA", "MixLoRA"])
def adapted(request, llava):
    return get_peft_model(llava, request.param)


def train(model, *names):
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(True)


def test_adapter_projector_and_new_embeddings_may_be_trained(adapted):
    check_trainable(adapted)
    train(adapted, "mm_projector", "embed_tokens", "lm_head")
    check_trainable(adapted)


def test_a_frozen_adapter_is_refused(adapted):
    adapted.requires_grad_(False)
    train(adapted, "mm_projector")
    message = message_of(check_trainable, adapted)
    assert "nothing of the" in message and "LORA adapter" in message and "--tune_mm_mlp_adapter" in message


@pytest.mark.parametrize("part", ["mlp.up_proj", "vision_tower", "norm"])
def test_a_base_that_is_trained_beside_is_refused(adapted, part):
    train(adapted, part)
    message = message_of(check_trainable, adapted)
    assert "of the base would be trained" in message and part.split(".")[0] in message


def test_biases_are_trained_where_they_are_asked_for(llava):
    model = get_peft_model(llava, LoraConfig(r=2, bias="all", **TARGETS))
    train(model, "vision_tower.vision_tower.post_layernorm.bias")
    check_trainable(model)


def test_flag_that_trains_the_base_is_named_with_what_to_write_instead(adapted):
    train(adapted, "mlp.up_proj")
    given = {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    message = message_of(check_trainable, adapted, given)
    assert message.startswith("--mm_tunable_parts mm_mlp_adapter,mm_language_model: ")
    assert "write --mm_tunable_parts mm_mlp_adapter, which trains the adapter and the projector" in message


def test_flag_that_freezes_the_adapter_is_named(adapted):
    adapted.requires_grad_(False)
    message = message_of(check_trainable, adapted, {"mm_tunable_parts": "mm_vision_resampler"})
    assert message.startswith("--mm_tunable_parts mm_vision_resampler: nothing of the")


def test_adapter_is_trained_beside_the_projector_that_a_flag_names_alone(adapted):
    check_trainable(adapted)
    wanted = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapted.requires_grad_(False)
    train(adapted, "mm_projector")
    arguments = SimpleNamespace(mm_tunable_parts="mm_mlp_adapter")  # some save the projector alone by it
    thaw_beside(adapted, {}, arguments)
    message_of(check_trainable, adapted)
    thaw_beside(adapted, {"mm_tunable_parts": "mm_mlp_adapter"}, arguments)
    check_trainable(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert wanted <= trained and {"mm_projector" in name for name in trained - wanted} <= {True}
    assert not hasattr(arguments, "mm_tunable_parts")
