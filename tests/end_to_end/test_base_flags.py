"""A run that leaves to its base what the base decides, and names what lies near it by relative paths."""

import json
import shutil
import subprocess

import pytest

from llava_mixlora.adapters.adapter_record import read_record
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.questions import read_questions
from llava_mixlora.inference.loading import load_for_inference

from .training import ALONE, PAPER_FORM, environment, train, write_inputs

OF_THE_BASE = ("mm_projector_type", "mm_vision_select_layer", "mm_use_im_patch_token", "vision_tower")
LEARN = ["--max_steps=40", "--per_device_train_batch_size=8", "--optim=adamw_torch", "--learning_rate=0.02"]


@pytest.fixture(scope="module")
def place(llava_folder, _llava, clip_folder, tokenizer_folder, tmp_path_factory):
    """A LLaVA that was trained on padded pictures, beside its tower, and its data; flags that say nothing of it."""
    place = tmp_path_factory.mktemp("base-flags")
    flags = write_inputs(place, _llava, clip_folder, tokenizer_folder, 8 * ["red"])
    config = json.loads((place / "llava" / "config.json").read_text())
    trained = {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 200, "mm_vision_tower": "/gone/clip"}
    (place / "llava" / "config.json").write_text(json.dumps({**config, **trained}))
    shutil.copytree(clip_folder, place / "clip")
    left = [flag for flag in flags if not flag.startswith(tuple(f"--{name}=" for name in OF_THE_BASE))]
    given = {"--model_name_or_path": "llava", "--data_path": "train.json", "--image_folder": "."}
    left = [flag for flag in left if flag.partition("=")[0] not in (*given, "--model_max_length")]
    return place, [*left, *(f"{flag}={value}" for flag, value in given.items()), "--mixlora_enable=True", *PAPER_FORM]


@pytest.fixture(scope="module")
def adapter(place):
    train(ALONE, place[1], place[0] / "out", *LEARN, "--save_strategy=no", "--vision_tower=./clip", cwd=place[0])
    return place[0] / "out"


def test_result_says_what_the_base_was_trained_with(adapter, place):
    config = json.loads((adapter / "config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["mm_vision_select_layer"] == -2
    assert config["mm_use_im_patch_token"] is False and config["image_aspect_ratio"] == "pad"
    assert config["tokenizer_model_max_length"] == 200
    assert config["vocab_size"] == json.loads((place[0] / "llava" / "config.json").read_text())["vocab_size"]


def test_result_names_base_and_tower_for_every_working_directory(adapter, place):
    assert json.loads((adapter / "config.json").read_text())["mm_vision_tower"] == str(place[0] / "clip")
    adapter_config = json.loads((adapter / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(place[0] / "llava")
    record = read_record(adapter)
    assert record.base.name_or_path == str(place[0] / "llava")
    assert record.vision_tower.name_or_path == str(place[0] / "clip")


def test_result_answers_from_another_working_directory(adapter, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = read_questions(place[0] / "train.json")
    ((_, answers),) = answer(load_for_inference(adapter), questions, max_new_tokens=4, progress=False)
    assert answers == 8 * ["red"]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--mm_projector_type=linear"], "--mm_projector_type linear: llava was trained with mlp2x_gelu"),
        (["--version=llava_v2"], "did you mean llava_v1?"),
        (["--mixlora_num_factor=4"], "did you mean --mixlora_num_factors?"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_contradicts_the_base_or_nobody_knows_is_one_line(place, flags, told):
    words = [*ALONE, *place[1], "--vision_tower=./clip", "--output_dir=refused", *flags]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=place[0])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert told in line
    assert not (place[0] / "refused").exists()
