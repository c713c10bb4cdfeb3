"""What a tower's configuration tells of it."""

import json

import pytest

from llava_mixlora.adapters.tower_config import tower_config

SIZES = {"image_size": 336, "patch_size": 14, "hidden_size": 1024}


@pytest.mark.parametrize("content", [SIZES, {"model_type": "clip", "vision_config": SIZES}])
def test_an_image_takes_a_position_for_each_patch(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    tower = tower_config(str(tmp_path))
    assert tower.image_tokens() == 576 and tower.image_tokens("cls_patch") == 577 and tower.hidden_size == 1024


def test_a_tower_that_is_not_there_tells_nothing():
    assert tower_config("/gone/tower") is None and tower_config(None) is None
