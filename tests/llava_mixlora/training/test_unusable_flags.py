"""Flags that upstream takes in silence, and makes nothing of that anybody can use."""

import pytest

from llava_mixlora.training.unusable_flags import check_usable

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

TEMPLATES = ["v1", "vicuna_v1", "llava_v1", "mistral_instruct", "plain"]


def check(defaults=(), **given):
    check_usable(given, dict.fromkeys(defaults), TEMPLATES)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"version": "v0"},
        {"version": "v0.5"},
        {"version": "llava_v1"},
        {"image_aspect_ratio": "pad", "mm_vision_select_feature": "cls_patch", "mm_patch_merge_type": "flat"},
        {"mm_projector_type": "mlp3x_gelu", "lora_bias": "lora_only"},
        {"tune_mm_mlp_adapter": False, "lora_weight_path": "", "freeze_backbone": True},
        {"evaluation_strategy": "no"},
        {"evaluation_strategy": "steps", "eval_data_path": "heldout.json"},
    ],
    ids=str,
)
def test_usable_flags_pass(given):
    check(**given)


@pytest.mark.parametrize(
    "flag, value, instead",
    [
        ("version", "vicuna_v2", "did you mean vicuna_v1?"),
        ("version", "gpt", "expected one of llava_v1, mistral_instruct"),
        ("tune_mm_mlp_adapter", True, "leave the flag out"),
        ("lora_weight_path", "adapter", "never reads it"),
        ("image_aspect_ratio", "anyres", "--image_aspect_ratio pad"),
        ("image_aspect_ratio", "padd", "--image_aspect_ratio pad"),
        ("mm_patch_merge_type", "spatial_unpad", "leave the flag out"),
        ("mm_vision_select_feature", "cls", "expected one of patch, cls_patch"),
        ("mm_projector_type", "mlp2x", "expected linear, identity or mlp2x_gelu"),
        ("lora_bias", "lora", "expected one of none, all, lora_only"),
        ("batch_eval_metrics", True, "leave it out"),
        ("evaluation_strategy", "steps", "--eval_data_path"),
        ("eval_strategy", "epoch", "--eval_data_path"),
    ],
)
def test_unusable_flag_is_named_with_what_to_do(flag, value, instead):
    message = message_of(check, **{flag: value})
    assert message.startswith(f"--{flag} ") and str(value) in message and instead in message


def test_fork_that_cuts_tiles_knows_more_words():
    fork = {"defaults": ["image_grid_pinpoints"]}
    check(**fork, image_aspect_ratio="anyres_max_9", mm_patch_merge_type="spatial_unpad", mm_projector_type="pooler")
