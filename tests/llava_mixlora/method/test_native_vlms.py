"""transformers' own vision-language models, tiny and random: what is adapted by default, and that it is trained."""

import re

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from llava_mixlora import MixLoraConfig
from llava_mixlora.method.model_inputs import image_positions

from ...tiny import layers, message_of, randomise

IMAGE = 310
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 16, "patch_size": 8}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
SMALL_PATCHES = {**TOWER, "image_size": 16, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**TEXT, "rope_parameters": MROPE, "rope_scaling": MROPE}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
SMOL = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": SMALL_PATCHES,
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
MLLAMA_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}
MODELS = {
    "Llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
    },
    "LlavaNext": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[16, 16], [16, 32]],
    },
    "LlavaOnevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": 311,
        "image_grid_pinpoints": [[16, 16]],
    },
    "Qwen2VL": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "Qwen2_5_VL": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
        **QWEN_TOKENS,
    },
    "Qwen3VL": {
        "text_config": {**QWEN_TEXT, "head_dim": 8},
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "SmolVLM": SMOL,
    "Idefics3": SMOL,
    "InternVL": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "PaliGemma": {
        "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
        "vision_config": {**SIGLIP, "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
        "hidden_size": 32,
    },
    "Gemma3": {
        "text_config": {**TEXT, "head_dim": 8},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "boi_token_index": 311,
        "eoi_token_index": 312,
        "mm_tokens_per_image": 4,
    },
    "Mllama": {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": ROPE,
            "rope_scaling": ROPE,
        },
        "vision_config": MLLAMA_TOWER,
        "image_token_index": IMAGE,
    },
}

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Qwen3VLConfig"), reason="this transformers has not all of these models"
)


@pytest.fixture(params=MODELS)
def base(request):
    name = request.param
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def adapted(base, **options):
    return get_peft_model(base, MixLoraConfig(r=2, num_factors=4, task_type="CAUSAL_LM", **options))


def padded_batch():
    ids = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_every_linear_layer_of_the_language_model_is_adapted_and_no_other(base):
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"(language_model|text_model)\.(.*\.)?layers\.\d+\.", name)
        if not re.search(r"vision|visual", name)
    }
    assert len(expected) >= 14
    assert {name.removeprefix("base_model.model.") for name in layers(adapted(base))} == expected


def test_image_tokens_are_known(base):
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, 7]])
    where, unknown = image_positions(base, {"input_ids": ids}, (1, 5))
    assert unknown is None and where.tolist() == [[False, True, True, False, False]]


def test_training_saving_and_merging(base, tmp_path):
    """Padded text, with gradient checkpointing; the adapter is loaded by its file alone."""
    model = randomise(adapted(base), scale=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = padded_batch()
    loss = model.train()(**batch).loss
    loss.backward()
    ran = [layer for layer in layers(model).values() if layer.last_routes["default"] is not None]
    assert len(ran) == 14  # without a picture Mllama passes over its layer that attends to pictures
    assert all(layer.mixlora_B["default"].grad is not None for layer in ran)
    assert {layer.mixlora_stats_usage["default"].sum().item() for layer in ran} == {2 * 2 * 2}  # pools, instances, r
    model.eval()
    batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
    if len(ran) == len(layers(loaded)):
        assert not layers(loaded.merge_and_unload())
    else:  # which has seen nothing
        assert "statistics" in message_of(loaded.merge_and_unload)
