"""What a base says of a run's flags, and what does not fit it."""

import json

import pytest
import torch

from llava_mixlora.training.base_flags import LLAVA_15, flags_of_the_base

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

DEFAULTS = {
    "model_name_or_path": "facebook/opt-125m",
    "vision_tower": None,
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
    "pretrain_mm_mlp_adapter": None,
    "image_aspect_ratio": "square",
    "image_folder": None,
    "model_max_length": 512,
    "cache_dir": None,
    "deepspeed": None,
}
TOWER = {"hidden_size": 16, "image_size": 24, "patch_size": 8, "num_hidden_layers": 3}


@pytest.fixture
def write(tmp_path):
    """Writes the `config.json` of a model; gives its folder."""

    def write(name, **config):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


@pytest.fixture
def tower(write):
    return write("tower", **TOWER)


@pytest.fixture
def says(tower):
    """What the `config.json` of a LLaVA says, but for what is changed."""
    return {
        "model_type": "llava_llama",
        "hidden_size": 32,
        "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 16,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
    }


@pytest.fixture
def llava(write, says):
    return write("llava", **says)


@pytest.fixture
def vicuna(write):
    return write("vicuna", model_type="llama", hidden_size=32, max_position_embeddings=4096)


@pytest.fixture
def projector(tmp_path):
    """Writes a pretrained projector; gives its file."""

    def projector(*depths, hidden=32, features=16, **further):
        sizes = {depth: (hidden, hidden if position else features) for position, depth in enumerate(depths)}
        state = {f"model.mm_projector.{depth}weight": torch.zeros(size) for depth, size in sizes.items()}
        state |= {f"model.mm_projector.{depth}bias": torch.zeros(hidden) for depth in sizes}
        (tmp_path / "pretrained").mkdir(exist_ok=True)
        torch.save({**state, **further}, tmp_path / "pretrained" / "mm_projector.bin")
        return str(tmp_path / "pretrained" / "mm_projector.bin")

    return projector


MLP2 = ("0.", "2.")


def fill(model, defaults=DEFAULTS, **given):
    return flags_of_the_base({"model_name_or_path": model, **given}, defaults)


def test_flags_that_are_not_given_are_those_of_the_llava(llava, tower):
    assert fill(llava) == {
        "vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "model_max_length": 2048,
    }


def test_flags_that_agree_with_the_llava_pass(llava, tower):
    added = fill(llava, **{**fill(llava), "model_max_length": 100})
    assert added == {}


@pytest.mark.parametrize(
    "flag, value, of_the_base",
    [
        ("mm_projector_type", "linear", "mlp2x_gelu"),
        ("mm_vision_select_layer", -1, "-2"),
        ("mm_vision_select_feature", "cls_patch", "patch"),
        ("mm_patch_merge_type", "spatial", "flat"),
        ("mm_use_im_start_end", True, "False"),
        ("mm_use_im_patch_token", True, "False"),
        ("image_aspect_ratio", "square", "pad"),
    ],
)
def test_flag_that_contradicts_the_llava_is_named(llava, flag, value, of_the_base):
    message = message_of(fill, llava, **{flag: value})
    assert message.startswith(f"--{flag} {value}: {llava}") and f"--{flag} {of_the_base}" in message


def test_llava_that_does_not_say_is_as_upstream_takes_it(write, says):
    silent = ("mm_projector_type", "mm_vision_select_feature", "image_aspect_ratio", "mm_use_im_patch_token")
    older = write("older", **{name: value for name, value in says.items() if name not in silent})
    added = fill(older, image_aspect_ratio="pad", mm_use_im_patch_token=True)
    assert added["mm_projector_type"] == "linear" and added["mm_vision_select_feature"] == "patch"
    assert "--mm_projector_type linear" in message_of(fill, older, mm_projector_type="mlp2x_gelu")


def test_square_images_of_a_base_were_nobodys_choice(write, says):
    assert "image_aspect_ratio" not in fill(write("llava", **says, **{}), image_aspect_ratio="pad")
    fill(write("square", **{**says, "image_aspect_ratio": "square"}), image_aspect_ratio="pad")


def test_base_of_anyres_images_has_to_be_told_another_way(write, says):
    tiles = write("llava-1.6", **{**says, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"})
    message = message_of(fill, tiles)
    assert tiles in message and "'anyres'" in message and "--image_aspect_ratio pad" in message
    assert fill(tiles, image_aspect_ratio="pad")["mm_patch_merge_type"] == "flat"


def test_fork_that_cuts_tiles_is_left_to_its_own_flags(write, says):
    tiles = write("llava-1.6", **{**says, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"})
    fork = {**DEFAULTS, "image_grid_pinpoints": None}
    added = fill(tiles, fork, image_aspect_ratio="anyres")
    assert "mm_patch_merge_type" not in added and added["mm_projector_type"] == "mlp2x_gelu"


def test_flags_that_a_fork_has_not_are_not_added(llava):
    older = {name: value for name, value in DEFAULTS.items() if name != "mm_patch_merge_type"}
    assert "mm_patch_merge_type" not in fill(llava, older)


def test_copy_of_the_tower_may_have_another_name(llava, write):
    copy = write("copy", **TOWER)
    assert "vision_tower" not in fill(llava, vision_tower=copy)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"patch_size": 4}, {"image_size": 32}])
def test_another_tower_is_named(llava, tower, write, change):
    other = write("other", **{**TOWER, **change})
    message = message_of(fill, llava, vision_tower=other)
    (field,) = change
    assert f"--vision_tower {other}" in message and tower in message and field in message


def test_tower_that_does_not_fit_is_named_where_the_base_s_own_is_gone(write, says):
    base = write("llava", **{**says, "mm_vision_tower": "/gone/tower"})
    copy, other = write("copy", **TOWER), write("other", **{**TOWER, "hidden_size": 32})
    fill(base, vision_tower=copy)
    message = message_of(fill, base, vision_tower=other)
    assert f"--vision_tower {other}" in message and "32" in message and "16" in message


def test_relative_tower_becomes_absolute(llava, tower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fill(llava, vision_tower="./tower")["vision_tower"] == tower


@pytest.mark.parametrize("limit, feature, fits", [(9, "patch", 0), (10, "patch", 1), (10, "cls_patch", 0)])
def test_limit_that_images_fill_is_named(write, says, limit, feature, fits):
    base = write("llava", **{**says, "mm_vision_select_feature": feature})
    if fits:
        fill(base, model_max_length=limit)
    else:
        message = message_of(fill, base, model_max_length=limit)
        assert f"--model_max_length {limit}: an image alone takes {9 + (feature == 'cls_patch')} tokens" in message


def test_upstreams_default_limit_is_refused_for_a_llava_that_tells_none(write, says):
    large = write("large", **{**TOWER, "image_size": 336, "patch_size": 14})
    told = {name: value for name, value in says.items() if name != "tokenizer_model_max_length"}
    message = message_of(fill, write("llava", **{**told, "mm_vision_tower": large}))
    assert "--model_max_length 512: an image alone takes 576 tokens" in message


def test_layer_that_the_tower_has_not_is_named(vicuna, tower):
    fill(vicuna, vision_tower=tower, mm_vision_select_layer=-4)
    message = message_of(fill, vicuna, vision_tower=tower, mm_vision_select_layer=-5)
    assert "--mm_vision_select_layer -5" in message and "3 layers" in message


def test_language_model_without_images_is_left_alone(vicuna):
    assert fill(vicuna) == {}


def test_language_model_with_images_becomes_a_llava_1_5(vicuna, tower):
    added = fill(vicuna, vision_tower=tower)
    assert added == {name: value for name, value in LLAVA_15.items() if name != "vision_tower"}


def test_language_model_takes_flags_as_they_are_given(vicuna, tower):
    given = {"mm_projector_type": "linear", "mm_vision_select_layer": -1, "mm_use_im_start_end": True}
    assert not set(fill(vicuna, vision_tower=tower, **given)) & set(given)


def test_pretrained_projector_says_what_it_is(vicuna, tower, projector):
    linear = projector("")
    assert fill(vicuna, vision_tower=tower, pretrain_mm_mlp_adapter=linear)["mm_projector_type"] == "linear"
    mlp = projector("0.", "2.", "4.")
    assert fill(vicuna, vision_tower=tower, pretrain_mm_mlp_adapter=mlp)["mm_projector_type"] == "mlp3x_gelu"
    message = message_of(fill, vicuna, vision_tower=tower, pretrain_mm_mlp_adapter=mlp, mm_projector_type="linear")
    assert "--mm_projector_type linear" in message and mlp in message and "mlp3x_gelu" in message


def test_configuration_beside_a_projector_says_how_it_was_trained(vicuna, tower, projector, write):
    file = projector(*MLP2)
    write("pretrained", mm_vision_tower=tower, mm_vision_select_layer=-1, mm_projector_type="mlp2x_gelu")
    added = fill(vicuna, pretrain_mm_mlp_adapter=file)
    assert added["mm_vision_select_layer"] == -1 and added["vision_tower"] == tower
    message = message_of(fill, vicuna, pretrain_mm_mlp_adapter=file, mm_vision_select_layer=-2)
    assert "--mm_vision_select_layer -2" in message and "pretrained/config.json" in message


@pytest.mark.parametrize("size", [{"hidden": 48}, {"features": 48}])
def test_projector_of_another_model_is_named(vicuna, tower, projector, size):
    file = projector(*MLP2, **size)
    message = message_of(fill, vicuna, vision_tower=tower, pretrain_mm_mlp_adapter=file)
    assert f"--pretrain_mm_mlp_adapter {file}" in message and "48" in message


def test_damaged_projector_is_named(vicuna, tower, tmp_path):
    (tmp_path / "mm_projector.bin").write_bytes(b"PK\x03\x04 nothing")
    file = str(tmp_path / "mm_projector.bin")
    assert file in message_of(fill, vicuna, vision_tower=tower, pretrain_mm_mlp_adapter=file)


def test_projector_without_rows_for_the_tokens_around_images_is_named(vicuna, tower, projector):
    given = {"vision_tower": tower, "mm_use_im_start_end": True}
    fill(vicuna, **given, pretrain_mm_mlp_adapter=projector(*MLP2, **{"model.embed_tokens.weight": torch.zeros(2, 32)}))
    message = message_of(fill, vicuna, **given, pretrain_mm_mlp_adapter=projector(*MLP2))
    assert message.startswith("--mm_use_im_start_end True")


def test_projector_for_a_llava_has_to_be_of_its_kind(llava, projector):
    fill(llava, pretrain_mm_mlp_adapter=projector(*MLP2))
    message = message_of(fill, llava, pretrain_mm_mlp_adapter=projector(""))
    assert "a projector of the type linear" in message


def test_projector_for_a_llava_under_zero_3_is_refused(llava, projector, tmp_path):
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    given = {"pretrain_mm_mlp_adapter": projector(*MLP2), "deepspeed": str(tmp_path / "zero3.json")}
    message = message_of(fill, llava, **given)
    assert "ZeRO-3" in message and "leave the flag out" in message


def test_base_that_cannot_be_found_is_left_to_upstream():
    assert fill("/gone/llava", mm_projector_type="linear") == {}
