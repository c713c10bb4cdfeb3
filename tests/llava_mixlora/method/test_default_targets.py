"""What is adapted where `target_modules` is unset: the decoder's linear layers, and nothing else."""

import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from llava_mixlora import MixLoraConfig

from ...tiny import LINEAR_LAYERS, layers, message_of, random_ids

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**TOWER, "image_size": 16, "patch_size": 8}
MIXTURE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def native(name, **options):
    """A tiny model of transformers' own by its name, random; skips where the installed transformers has none."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(**options)
    kinds = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
    torch.manual_seed(0)
    return next(getattr(transformers, name + kind) for kind in kinds if hasattr(transformers, name + kind))(config)


def llava_of(text):
    return native(
        "Llava",
        text_config={"model_type": text, **TEXT},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_index=7,
    )


def adapted(model, **options):
    return get_peft_model(model, MixLoraConfig(**{"r": 2, "num_factors": 4, **options}))


def names(model):
    return {name.removeprefix("base_model.model.") for name in layers(model)}


@pytest.mark.parametrize(
    ("name", "options", "per_layer"),
    [("Llama", TEXT, 7), ("Mistral", TEXT, 7), ("Qwen2", TEXT, 7), ("GPT2", GPT2, 4), ("OPT", OPT, 6)],
)
def test_text_models_are_adapted_in_every_layer_of_their_decoder(name, options, per_layer):
    model = adapted(native(name, **options))
    assert len(names(model)) == 2 * per_layer and not any("lm_head" in each for each in names(model))
    # As short as a reader of adapter_config.json would write it.
    assert not any("." in target for target in model.peft_config["default"].target_modules)


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_vision_language_models_are_adapted_in_the_language_model_alone(text, tmp_path):
    model = adapted(llava_of(text))
    found = names(model)
    assert len(found) == 14 and not any(re.search("vision|projector|lm_head", name) for name in found)
    model.save_pretrained(tmp_path)
    assert names(PeftModel.from_pretrained(llava_of(text), str(tmp_path))) == found


def test_upstreams_llava_is_adapted_as_by_its_own_training(llava, tmp_path):
    model = adapted(llava)
    found = names(model)
    assert len(found) == 14 and all(name.startswith("model.layers.") for name in found)
    assert {name.rpartition(".")[2] for name in found} == set(LINEAR_LAYERS)


def test_tower_that_comes_later_is_not_adapted(llava, copy_of, tmp_path):
    """LLaVA's tower is loaded after the adapter is made, and before it is loaded."""
    bare = copy_of(llava)
    bare.get_vision_tower().vision_tower = None
    model = adapted(bare)
    model.save_pretrained(tmp_path)
    assert names(PeftModel.from_pretrained(llava, str(tmp_path))) == names(model)


@pytest.mark.parametrize("name", ["Llama", "Llava"])
def test_layers_are_chosen_by_their_index(name):
    model = llava_of("llama") if name == "Llava" else native(name, **TEXT)
    found = names(adapted(model, layers_to_transform=[1]))
    assert len(found) == 7 and all("layers.1." in each for each in found)


def test_layers_can_be_left_out_of_the_default():
    assert len(names(adapted(llava_of("llama"), exclude_modules=["o_proj", "down_proj"]))) == 10


def test_second_adapter_has_the_same_default():
    model = adapted(llava_of("llama"))
    model.add_adapter("second", MixLoraConfig(r=1, num_factors=2))
    assert all("second" in layer.mixlora_A for layer in layers(model).values()) and len(layers(model)) == 14


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_experts_of_a_mixture_are_named_as_left_out(name):
    base = native(name, **TEXT, **MIXTURE, head_dim=8)
    with pytest.warns(UserWarning, match="experts of mixtures .*are left out") as caught:
        model = adapted(base)
    assert len([each for each in caught if "left out" in str(each.message)]) == 1
    found = names(model)
    assert not any(".experts." in each or each.endswith("gate") for each in found)
    assert len(found) == 2 * (7 if name == "Qwen2Moe" else 4)
    ids = random_ids(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()


def test_all_linear_says_that_it_takes_a_tower():
    with pytest.warns(UserWarning, match="outside of the language model's decoder") as caught:
        model = adapted(llava_of("llama"), target_modules="all-linear")
    (line,) = [str(each.message) for each in caught if "decoder" in str(each.message)]
    assert "\n" not in line
    outside = [name for name in names(model) if not re.search(r"language_model\.(model\.)?layers\.", name)]
    assert f"takes {len(outside)} linear layers" in line and len(outside) >= 14


def test_all_linear_says_nothing_where_there_is_no_tower():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted(native("Llama", **TEXT), target_modules="all-linear")
    assert len(names(model)) == 14 and not any("decoder" in str(each.message) for each in caught)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Linear(4, 4)),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)),
    ],
    ids=["no transformer", "vision tower"],
)
def test_model_without_a_decoder_is_one_clear_line(model):
    line = message_of(adapted, model())
    assert "target_modules is unset" in line and "no decoder" in line and "target_modules=[" in line
