"""The formats that questions come in, and what is wrong with some."""

import json
import os

import pytest
from PIL import Image

from llava_mixlora import MixLoraError
from llava_mixlora.evaluation.questions import read_questions
from llava_mixlora.limits import VARIABLE

pytestmark = pytest.mark.one_stack


@pytest.fixture
def place(tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def of_authors(identity, **changed):
    return {"unique_id": identity, "prompt": "what? [Options]: x", "target": "x", "image_path": "a.png", **changed}


def of_llava(identity, **changed):
    return {"question_id": identity, "text": "what?", "image": "b.jpg", **changed}


def message_of(*arguments, **options):
    with pytest.raises(MixLoraError) as error:
        read_questions(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_authors_file_is_one_task(place):
    (question,) = read_questions(lines(place / "text_vqa.jsonl", of_authors("q1")))
    assert (question.id, question.task, question.target) == ("q1", "text_vqa", "x")
    assert question.prompt == "what? Options: x" and question.image == place / "a.png"


def test_folder_of_authors_files_has_a_task_for_each(place):
    lines(place / "cifar_10.jsonl", of_authors(1), of_authors(2))
    lines(place / "mnist.jsonl", of_authors(1))
    assert [question.id for question in read_questions(place)] == ["cifar_10/1", "cifar_10/2", "mnist/1"]
    assert [question.task for question in read_questions(place, tasks=["mnist"])] == ["mnist"]
    assert [question.id for question in read_questions(place, limit=1)] == ["cifar_10/1", "mnist/1"]


def test_llavas_question_file_and_popes_labels(place):
    file = lines(place / "pope.jsonl", of_llava(1, category="random"), of_llava(2, category="popular"))
    assert [(q.task, q.target) for q in read_questions(file)] == [("random", None), ("popular", None)]
    file = lines(place / "coco_pope_random.json", of_llava(1, label="yes"))
    assert [(q.task, q.target) for q in read_questions(file)] == [("coco_pope_random", "yes")]


def test_training_data_ask_their_first_question(place):
    turns = [("human", "<image>\nwhat?"), ("gpt", "x"), ("human", "why?"), ("gpt", "y")]
    conversation = [{"from": speaker, "value": text} for speaker, text in turns]
    sample = {"id": "s", "task": "shape", "image": "a.png", "conversations": conversation}
    (place / "heldout.json").write_text(json.dumps([sample]))
    (question,) = read_questions(place / "heldout.json")
    assert (question.id, question.task, question.prompt, question.target) == ("s", "shape", "what?", "x")


@pytest.mark.parametrize("deep", [False, True])
def test_both_layouts_of_mme(tmp_path, deep):
    images = tmp_path / "existence" / ("images" if deep else "")
    texts = tmp_path / "existence" / ("questions_answers_YN" if deep else "")
    images.mkdir(parents=True)
    texts.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(images / "001.png")
    (texts / "001.txt").write_text("Is there a dog? Please answer yes or no.\tYes\nIs there a cat?\tNo\n")
    found = read_questions(tmp_path)
    assert [(q.id, q.task, q.target) for q in found] == [
        ("existence/001/0", "existence", "Yes"),
        ("existence/001/1", "existence", "No"),
    ]
    assert found[0].image == images / "001.png" and found[0].prompt.endswith("yes or no.")


def test_what_is_wrong_is_one_line(place):
    assert "no such file" in message_of(place / "absent.jsonl")
    assert "holds no questions" in message_of(lines(place / "empty.jsonl"))
    assert "two questions have the id 'q'" in message_of(lines(place / "x.jsonl", of_authors("q"), of_authors("q")))
    without = of_authors("q")
    del without["image_path"]
    assert "has no image" in message_of(lines(place / "x.jsonl", without))
    assert "no such image" in message_of(lines(place / "x.jsonl", of_authors("q", image_path="c.png")))
    assert "its tasks are x" in message_of(lines(place / "x.jsonl", of_authors("q")), tasks=["y"])
    assert "line 1: no question" in message_of(lines(place / "x.jsonl", {"id": 3}))
    (place / "x.jsonl").write_text("{")
    assert "line 1: not valid JSON" in message_of(place / "x.jsonl")


def test_mme_that_is_incomplete_is_one_line(tmp_path):
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "7.txt").write_text("How many?\tYes\n")
    assert "no image 7.jpg or .png" in message_of(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "count" / "7.png")
    (tmp_path / "count" / "7.txt").write_text("How many? Yes\n")
    assert "a tab and Yes or No" in message_of(tmp_path)


def test_question_that_is_no_text_is_named(place):
    for prompt in (None, 7, ["what?"], {"text": "what?"}):
        message = message_of(lines(place / "q.jsonl", of_authors("1"), of_authors("2", prompt=prompt)))
        assert "q.jsonl, line 2: prompt is" in message and repr(prompt) in message
    assert "text is None" in message_of(lines(place / "q.jsonl", of_llava("1", text=None)))
    assert "half of a character" in message_of(lines(place / "q.jsonl", of_llava("1", text="what\ud800?")))


def test_sign_that_some_take_for_the_end_of_a_line_is_part_of_the_question(place):
    question = json.dumps(of_llava("1", text="what\u2028is\x85it?"), ensure_ascii=False)
    (place / "q.jsonl").write_text(f"{question}\r\n\n", encoding="utf-8")
    assert [asked.prompt for asked in read_questions(place / "q.jsonl")] == ["what\u2028is\x85it?"]


def test_file_that_is_no_text_is_named(place):
    (place / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not text in UTF-8" in message_of(place / "q.jsonl")
    (place / "q.jsonl").write_text('{"a":' * 100_000)
    assert "line 1: nested too deep" in message_of(place / "q.jsonl")


def test_pipe_is_not_waited_for(place):
    os.mkfifo(place / "q.jsonl")
    os.mkfifo(place / "q.json")
    for source in (place / "q.jsonl", place / "q.json", place):
        assert "no regular file" in message_of(source)


def test_question_of_too_many_letters_is_refused(place, monkeypatch):
    monkeypatch.setenv(VARIABLE, "prompt_letters=10")
    assert len(read_questions(lines(place / "q.jsonl", of_llava("1", text="0123456789")))) == 1
    assert "a question of 11 letters" in message_of(lines(place / "q.jsonl", of_llava("1", text="0123456789?")))


def test_line_that_never_ends_is_not_read_to_its_end(place):
    lines(place / "questions.jsonl", of_llava(1))
    os.truncate(place / "questions.jsonl", 1 << 40)
    assert "line 2: more than" in message_of(place / "questions.jsonl")
