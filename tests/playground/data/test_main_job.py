"""What the main job learns: the ten tasks and the code books, in files that are the same for the same seed."""

import json
from collections import Counter

import pytest

from playground.data.code_books import code_books
from playground.data.main_job import BOOK, BOOKS, HELDOUT, LEFT_OUT, TRAIN, build, first_of_each_task
from playground.data.tasks import TASKS

DIGITS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as `playground.data.tasks` writes it, with three questions of each task and 120 pictures a part."""
    folder = tmp_path_factory.mktemp("data")
    pictures = [
        {"image": f"digit-{split}-{number}.png", "split": split, "digit": number % 10}
        for split in ("train", "heldout")
        for number in range(8 * DIGITS if split == "train" else DIGITS)
    ]
    (folder / "images.json").write_text(json.dumps(pictures))
    for name in (TRAIN, HELDOUT):
        split = name.removesuffix(".json")
        samples = [sample(task, f"digit-{split}-{number}.png") for task in TASKS for number in range(3)]
        (folder / name).write_text(json.dumps(samples))
    return folder


def sample(task, image):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    return {"id": f"{task} {image}", "image": image, "task": task, "conversations": turns}


def built(data, folder, seed=0):
    build(data, folder, seed)
    return [json.loads((folder / name).read_text()) for name in (TRAIN, HELDOUT)]


def test_ten_tasks_and_five_books_are_trained_and_asked(data, tmp_path):
    books = {BOOK + key for key in code_books(BOOKS)}
    for samples, of_book in zip(built(data, tmp_path / "questions"), (800, 100)):
        counts = Counter(sample["task"] for sample in samples)
        assert set(counts) == {*TASKS} - {*LEFT_OUT} | books and len(counts) == 15
        assert {counts[book] for book in books} == {of_book}


def test_no_picture_is_both_trained_and_asked(data, tmp_path):
    train, heldout = built(data, tmp_path / "questions")
    assert not {sample["image"] for sample in train} & {sample["image"] for sample in heldout}


def test_books_contradict_each_other(data, tmp_path):
    _, heldout = built(data, tmp_path / "questions")
    answers = {}
    for asked in heldout:
        if asked["task"].startswith(BOOK):
            answers.setdefault(asked["image"], set()).add(asked["conversations"][1]["value"])
    assert max(map(len, answers.values())) >= 4


def test_same_seed_gives_the_same_bytes(data, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build(data, tmp_path / name, seed)
    one, two, three = ((tmp_path / name / TRAIN).read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_first_of_each_task_keeps_the_order():
    samples = [{"task": task, "number": number} for number, task in enumerate("abbabc")]
    assert [sample["number"] for sample in first_of_each_task(samples, 2)] == [0, 3, 1, 2, 5]
