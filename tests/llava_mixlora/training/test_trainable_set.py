"""A run trains its adapter and LLaVA's projector, and nothing of the base."""

import pytest
from peft import LoraConfig, get_peft_model

from llava_mixlora import MixLoraConfig
from llava_mixlora.training.trainable_set import check_trainable

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
