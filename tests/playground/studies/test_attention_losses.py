"""`playground.studies.attention_losses`: three real runs of upstream's training."""

import json

import pytest
import torch

from playground.studies.attention_losses import compare

from ...tiny import draw_pictures


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the first run may use flash attention")
def test_without_flash_attention_both_programs_train_alike(llava_folder, clip_folder, tmp_path):
    draw_pictures(tmp_path, 4)
    turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", "red")]
    conversation = [{"from": speaker, "value": value} for speaker, value in turns]
    samples = [{"id": str(n), "image": f"{n}.png", "conversations": conversation} for n in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    flags = {
        "model_name_or_path": llava_folder,
        "data_path": tmp_path / "train.json",
        "image_folder": tmp_path,
        "vision_tower": clip_folder,
        "per_device_train_batch_size": 2,
    }
    result = compare(flags, steps=2)
    assert result["attention"] == "sdpa"
    assert result["losses"]["train_mem"] == result["losses"]["train"] and result["largest_difference"] == 0
    assert 0 < result["bfloat16_noise"] < 0.5
