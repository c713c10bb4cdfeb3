"""Upstream's data set of conversations, as runs through the plugin use it."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from ..tiny import message_of

TURNS = [{"from": "human", "value": "<image>\nwhat color"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def dataset(patched, tmp_path, tokenizer_folder, clip_folder):
    """Makes the data set of samples about these images, as outside of a run."""
    from llava.train.train import DataArguments, LazySupervisedDataset

    def dataset(*images):
        samples = [{"image": image, "conversations": TURNS} for image in images]
        (tmp_path / "data.json").write_text(json.dumps(samples))
        arguments = DataArguments(str(tmp_path / "data.json"), image_folder=str(tmp_path), is_multimodal=True)
        arguments.image_processor = CLIPImageProcessor.from_pretrained(clip_folder)
        arguments.mm_use_im_start_end = False
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)
        tokenizer.pad_token = tokenizer.unk_token
        return LazySupervisedDataset(str(tmp_path / "data.json"), tokenizer, arguments)

    return dataset


def test_images_are_seen_as_viewers_show_them(dataset, tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 16))  # its left half
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    Image.new("I;16", (16, 16), 32_768).save(tmp_path / "gray.png")
    upright, turned, gray = (dataset("upright.png", "turned.png", "gray.png")[number]["image"] for number in range(3))
    assert turned.flip(-1).equal(upright) and not turned.equal(upright)
    assert abs(gray.mean().item()) < 0.01  # half of the way from -1 to 1


def test_a_sample_that_cannot_be_read_names_file_and_entry(dataset, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    (tmp_path / "damaged.png").write_text("no image")
    data = dataset("1.png", "damaged.png", "gone.png")
    assert data[0]["input_ids"] is not None
    for number, problem in ((1, "damaged.png: not an image"), (2, "gone.png: no such image")):
        said = message_of(data.__getitem__, number)
        assert said.startswith(f"{tmp_path / 'data.json'}: entry {number}: ") and problem in said
