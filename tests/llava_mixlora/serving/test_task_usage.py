"""Which factors the training tasks use, asked of an engine by kept samples."""

import asyncio
import json

import pytest

from llava_mixlora.serving.engine import Piece
from llava_mixlora.serving.places import Places
from llava_mixlora.serving.request_error import RequestError
from llava_mixlora.serving.task_usage import NOTHING, OF_A_TASK, TaskUsage, samples_of_tasks, usage_of

from ...tiny import draw_pictures

ABOUT = {"mixlora": {"num_factors": 4, "r": 2, "pairing": "rank"}}


class Engine:
    """Chooses by whether a question is of colours; notes what it was asked, and how many asked at a time."""

    def __init__(self, refuses=""):
        self.models = {"mine": ABOUT}
        self.asked, self.now, self.most, self.refuses = [], 0, 0, refuses

    async def answer(self, request):
        (message,) = request.messages
        self.asked.append((message.text, len(message.pictures), request.max_tokens))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        if self.refuses and self.refuses in message.text:
            raise RequestError("too long")
        chosen = ([0, 1], [2, 3]) if "color" in message.text else ([0, 2], [0, 1])
        yield Piece("a", "length", routes={"layers.0.q_proj": chosen})


@pytest.fixture
def adapter(tmp_path):
    return adapter_of(tmp_path, {"colour": "what color?", "shape": "what shape?"})


def adapter_of(place, tasks, pictures=3, count=12):
    """A folder with kept samples of tasks, `count` of each, whose pictures are `pictures` in turn."""
    draw_pictures(place, pictures)
    samples = [sample(f"<image>\n{tasks[task]}", f"{n % 3}.png", task) for n in range(count) for task in tasks]
    write(place, samples)
    return place


def sample(question, image=None, task=None):
    fields = {"image": image, "task": task}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
    return {**{name: value for name, value in fields.items() if value}, "conversations": turns}


def write(place, samples):
    kept = {"data": "data.json", "image_folder": str(place), "version": "v1", "samples": samples}
    (place / "calibration.json").write_text(json.dumps(kept))


def usage(engine, folder, *models):
    async def ask():
        places = Places(2, 8)
        usage = TaskUsage(engine, places, {"mine": folder})
        found = await asyncio.gather(*(usage.of(model) for model in models))
        assert places.counts() == {"answering": 0, "waiting": 0}
        return found

    return asyncio.run(ask())


def test_usage_is_the_share_of_a_tasks_samples_that_choose_a_factor(adapter):
    engine = Engine()
    (found,) = usage(engine, adapter, "mine")
    assert found["tasks"] == ["colour", "shape"]
    assert found["usage"] == {"layers.0.q_proj": [[[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 1, 0], [1, 1, 0, 0]]]}
    assert len(engine.asked) == 2 * OF_A_TASK and set(engine.asked) == {("what color?", 1, 1), ("what shape?", 1, 1)}


def test_shares_are_of_the_samples_and_one_choice_is_told_once():
    seen = {"one": [{"q": ([0, 1], [0, 1])}, {"q": ([0, 2], [0, 2])}], "two": [{"q": ([3, 2], [3, 2])}]}
    found = usage_of(seen, {"mixlora": {"num_factors": 4, "pairing": "same"}})
    assert found == {"tasks": ["one", "two"], "usage": {"q": [[[1, 0.5, 0.5, 0]], [[0, 0, 1, 1]]]}}


def test_it_is_made_once_however_many_ask_and_takes_one_place(adapter):
    engine = Engine()
    first, second, other = usage(engine, adapter, "mine", "mine", "mine:base")
    assert first == second and other == NOTHING
    assert len(engine.asked) == 2 * OF_A_TASK and engine.most == 1


def test_task_that_is_not_answered_is_left_out_and_one_alone_tells_nothing(tmp_path):
    folder = adapter_of(tmp_path, {"colour": "what color?", "shape": "what shape?", "word": "a word"})
    assert usage(Engine(refuses="shape"), folder, "mine")[0]["tasks"] == ["colour", "word"]
    assert usage(Engine(refuses=" "), folder, "mine") == [NOTHING]
    assert usage(Engine(refuses="what"), folder, "mine") == [NOTHING]


def test_samples_are_those_with_a_task_whose_pictures_are_there(tmp_path):
    draw_pictures(tmp_path, 1)
    (tmp_path / "1.png").write_bytes(b"no picture")
    seen = sample("<image>\na", "0.png", "seen")
    others = [sample("<image>\na", "1.png", "damaged"), sample("<image>\na", "2.png", "gone"), sample("a")]
    write(tmp_path, [seen, *others, sample("a", task="text")])
    found = samples_of_tasks(tmp_path)
    assert found == {"seen": [{**seen, "image": str(tmp_path / "0.png")}], "text": [sample("a", task="text")]}


@pytest.mark.parametrize("content", [None, "{", '{"samples": 3}'])
def test_nothing_is_told_where_no_samples_can_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "calibration.json").write_text(content)
    engine = Engine()
    assert usage(engine, tmp_path, "mine") == [NOTHING] and engine.asked == []


def test_what_a_browser_could_not_hold_is_left_out():
    seen = {str(task): [{"q": ([0], [0])}] for task in range(130)}
    assert usage_of(seen, {"mixlora": {"num_factors": 4096, "pairing": "same"}}) == NOTHING
