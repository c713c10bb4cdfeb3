"""What a run keeps of its data beside the adapter."""

import json

import pytest

from llava_mixlora.data.kept_calibration import KEPT, check_count, keep_calibration, kept_calibration

from ...tiny import message_of

SAMPLES = [
    {
        "id": str(number),
        "image": f"{number}.png",
        "task": ["shape", "color"][number % 2],
        "source": "a field of one's own",
        "conversations": [{"from": "human", "value": "<image>\nwas ist das?"}, {"from": "gpt", "value": "grün"}],
    }
    for number in range(20)
]


def keep(folder, count=6, samples=SAMPLES, image_folder="images", seed=0):
    keep_calibration(folder, samples, count, "data.json", image_folder, "v1", seed)


def test_samples_of_all_tasks_are_kept_with_absolute_paths_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep(tmp_path)
    kept = kept_calibration(tmp_path)
    assert kept.data == str(tmp_path / "data.json") and kept.image_folder == str(tmp_path / "images")
    assert kept.version == "v1" and sorted(sample["task"] for sample in kept.samples) == 3 * ["color"] + 3 * ["shape"]
    assert all(set(sample) == {"id", "image", "task", "conversations"} for sample in kept.samples)
    assert [file.name for file in tmp_path.iterdir()] == [KEPT]
    assert "grün" in (tmp_path / KEPT).read_text(encoding="utf-8")


def test_the_same_run_keeps_the_same_at_every_save(tmp_path):
    contents = []
    for seed in (0, 0, 1):
        keep(tmp_path, seed=seed)
        contents.append((tmp_path / KEPT).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_nothing_is_kept_where_none_is_asked_for(tmp_path):
    keep(tmp_path)
    keep(tmp_path, count=0)
    assert not (tmp_path / KEPT).exists() and kept_calibration(tmp_path) is None


def test_text_alone_needs_no_image_folder(tmp_path):
    texts = [{name: value for name, value in sample.items() if name != "image"} for sample in SAMPLES]
    for sample in texts:
        sample["conversations"] = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    keep(tmp_path, samples=texts, image_folder=None)
    assert kept_calibration(tmp_path).image_folder is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"samples": {}}, "a list 'samples'"),
        ({"version": None}, "'version'"),
        ({"image_folder": 3}, "'image_folder'"),
        ({"samples": [{"conversations": []}]}, "sample 0"),
        ({"samples": [*SAMPLES[:2], "text"]}, "sample 2"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, said):
    keep(tmp_path)
    content = json.loads((tmp_path / KEPT).read_text())
    (tmp_path / KEPT).write_text(json.dumps({**content, **change}))
    found = message_of(kept_calibration, tmp_path)
    assert str(tmp_path / KEPT) in found and said in found and "delete it" in found


@pytest.mark.parametrize("count", [-1, 1])
def test_a_number_that_merging_could_not_use_is_refused(count):
    assert f"--mixlora_calibration_samples {count}" in message_of(check_count, count)
    for usable in (0, 2, 512):
        check_count(usable)


def test_samples_that_are_a_link_out_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "adapter").mkdir()
    keep(tmp_path)
    (tmp_path / "adapter" / KEPT).symlink_to("../" + KEPT)
    assert "outside of its folder" in message_of(kept_calibration, tmp_path / "adapter")
