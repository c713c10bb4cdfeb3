"""Data that several tests of the library read."""

import json

import pytest

from ..tiny import draw_pictures


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twenty pictures with a question each, of two tasks."""
    place = tmp_path_factory.mktemp("data")
    draw_pictures(place, 20)
    samples = []
    for number in range(20):
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", ["red", "blue circle"][number % 2])]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        task = ["color", "shape"][number % 2]
        samples.append({"id": str(number), "image": f"{number}.png", "task": task, "conversations": conversation})
    (place / "data.json").write_text(json.dumps(samples))
    return place
