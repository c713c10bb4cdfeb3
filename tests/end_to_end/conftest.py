"""What end-to-end tests train on."""

import json
import shutil

import pytest
from PIL import Image

ANSWER = "red"  # always: the loss is a mean over tokens, and halves of a batch must have equally many


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """A random LLaVA with a tokenizer, and eight pictures with a question each, as flags of llava.train.train."""
    place = tmp_path_factory.mktemp("inputs")
    _llava.save_pretrained(place / "llava")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, place / "llava")
    samples = []
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 255 - 30 * number)).save(place / f"{number}.png")
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", ANSWER)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (place / "train.json").write_text(json.dumps(samples))
    flags = {
        "model_name_or_path": place / "llava",
        "version": "llava_v1",
        "data_path": place / "train.json",
        "image_folder": place,
        "vision_tower": clip_folder,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "max_steps": 2,
        "learning_rate": 1.0,
        "optim": "sgd",  # Adam would make full steps of what is rounding noise in a gradient
        "model_max_length": 256,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "lora_r": 2,
        "lora_dropout": 0.0,  # its draws differ between one process and two
        "use_cpu": True,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()]
