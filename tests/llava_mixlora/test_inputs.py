"""What users give is read, or named in one line."""

import json

import pytest

from llava_mixlora.inputs import check_images, check_writable, read_conversations

from ..tiny import message_of

pytestmark = pytest.mark.one_stack

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "not valid JSON"),
        ('[{"conversations": [', "not valid JSON"),
        ("{}", "expected a JSON list with at least one conversation, got dict"),
        ("[]", "an empty list"),
        ("3", "got int"),
        ("[1]", "entry 0"),
        ('[{"id": 1}]', "entry 0"),
        (json.dumps([{"conversations": TURNS}, {"conversations": TURNS[:1]}]), "entry 1"),
        (json.dumps([{"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}]), "entry 0"),
        (json.dumps([{"conversations": [{"from": "human", "value": None}, TURNS[1]]}]), "entry 0"),
        (json.dumps([{"conversations": "hello"}]), "entry 0"),
    ],
)
def test_broken_data_is_described(tmp_path, content, named):
    path = tmp_path / "data.json"
    path.write_text(content)
    message = message_of(read_conversations, path)
    assert named in message and str(path) in message


def test_data_that_is_not_text_is_described(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\x00binary")
    assert "not valid JSON" in message_of(read_conversations, tmp_path / "data.json")


def test_folder_in_place_of_data_is_described(tmp_path):
    assert "cannot be read" in message_of(read_conversations, tmp_path)


def test_well_formed_data_is_returned(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps([{"image": "1.png", "conversations": TURNS}, {"conversations": TURNS}])
    )
    assert [sample["conversations"] for sample in read_conversations(tmp_path / "data.json")] == [TURNS, TURNS]


def test_first_missing_image_is_named_with_its_entry_and_their_number(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    names = ["1.png", "gone/b.png", "gone/a.png", "gone/b.png"]
    samples = [{"image": name, "conversations": TURNS} for name in names]
    message = message_of(check_images, samples, "data.json", tmp_path)
    assert f"{tmp_path}/gone/b.png: no such image" in message
    assert "entry 1 of data.json" in message and "(2 of 3 images are missing)" in message


def test_samples_without_images_need_none():
    check_images([{"conversations": TURNS}], "data.json", "/no/such/folder")


def test_output_folder_in_use_is_kept(tmp_path):
    (tmp_path / "kept").write_text("kept")
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_read_only_place_is_named():
    assert "cannot be written" in message_of(check_writable, "/proc/llava-mixlora")
