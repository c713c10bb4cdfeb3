"""One reading of the data tells what is trained on, repaired, lost and why."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from llava_mixlora.data import check as module
from llava_mixlora.data.check import check_data
from llava_mixlora.data.token_counts import TokenCounter

from ...tiny import message_of


def entry(question="<image>\nwhat color", answer="red", image="1.png"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**({"image": image} if image else {}), "conversations": turns}


GOOD, TEXT, EMPTY, GONE = entry(), entry("what color", image=None), entry(answer=""), entry(image="gone.png")


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")

    def data(*found):
        (tmp_path / "data.json").write_text(json.dumps(found))
        return tmp_path / "data.json"

    return data


@pytest.fixture
def counter(patched, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, model_max_length=256, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    return TokenCounter(tokenizer, "v1", 4)


def test_what_is_lost_is_left_out_and_counted_by_reason(data, tmp_path):
    found = check_data(data(GOOD, EMPTY, TEXT, GONE, EMPTY, 3), tmp_path, keep=True)
    assert found.samples == [GOOD, TEXT] and list(found.numbers) == [0, 2]
    assert {why: (lost.count, lost.numbers) for why, lost in found.lost.items()} == {
        "an answer is empty": (2, [1, 4]),
        "its image cannot be used": (1, [3]),
        "not a conversation": (1, [5]),
    }
    table = found.table()
    assert "6 entries" in table and "1 with images, 1 of text alone" in table
    assert "2  an answer is empty; entries 1, 4" in table and "1  not a conversation; entry 5" in table


def test_repairs_are_counted(data, tmp_path):
    found = check_data(data(GOOD, entry("what color"), entry(image=None) | {"image": None}), tmp_path)
    assert [repaired.numbers for repaired in found.repaired.values()] == [[1], [2]] and found.samples is None
    assert "put in front of the first question; entry 1" in found.table()


@pytest.mark.parametrize(
    "lost, share, refused",
    [(0, 0, False), (1, 0, True), (1, 0.01, True), (1, 0.1, False), (5, 0.5, False), (5, 0.4, True), (10, 1, True)],
)
def test_losses_above_a_share_are_refused(data, tmp_path, lost, share, refused):
    found = check_data(data(*[GOOD] * (10 - lost), *[EMPTY] * lost), tmp_path)
    if not refused:
        return found.refuse_losses(share)
    message = message_of(found.refuse_losses, share)
    assert f"entry {10 - lost}: an answer is empty" in message and f"{lost} of 10 entries teach nothing" in message
    assert ("nothing is left to learn" if lost == 10 else f"more than --max_lost_share {share:g} allows") in message


def test_the_first_loss_is_named_whatever_its_reason(data, tmp_path):
    found = check_data(data(GOOD, GONE, EMPTY, EMPTY), tmp_path)
    message = message_of(found.refuse_losses, 0.01)
    assert "entry 1: " in message and f"{tmp_path}/gone.png: no such image" in message
    assert "1 its image cannot be used, 2 an answer is empty" in message


def test_each_image_is_looked_at_once(data, tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(module, "image_problem", lambda file, *_: looked_at.append(file))
    check_data(data(GOOD, GOOD, GONE), tmp_path)
    assert looked_at == [f"{tmp_path}/1.png", f"{tmp_path}/gone.png"]


def test_tokens_are_counted_and_what_is_cut_before_its_answer_is_lost(data, tmp_path, counter):
    long_answer, long_question = entry(answer="red " * 300), entry("<image>\n" + "what " * 300)
    found = check_data(data(GOOD, long_answer, long_question, TEXT), tmp_path, counter=counter)
    assert found.usable == 3 and found.lost["cut off before its answer"].numbers == [2]
    assert found.tokens.counted == 3 and found.tokens.cut.numbers == [1] and found.tokens.longest_entry == 1
    assert found.tokens.longest > 256 and 0 < found.tokens.supervised < found.tokens.tokens
    assert "cut                       1  by --model_max_length 256; entry 1" in found.table()


def test_of_many_samples_those_are_counted_that_may_not_fit(data, tmp_path, counter, monkeypatch):
    monkeypatch.setattr(module, "COUNTED", 3)
    monkeypatch.setattr(module, "EVERY", 10)
    counter.tokenizer.model_max_length = 1024
    long_question, stumbles = entry("<image>\n" + "what " * 1000), entry(answer="red</s>")
    file = data(
        *[entry(answer="red" + " red" * (number % 5)) for number in range(1, 40) if number % 5], long_question, stumbles
    )
    found = check_data(file, tmp_path, counter=counter)
    assert found.lost["cut off before its answer"].numbers == [32]
    assert found.lost["a mark of the template in the text"].numbers == [33]
    assert found.usable == 32 and found.tokens.counted < 32


def test_findings_are_told_to_programs(data, tmp_path, counter):
    found = json.loads(json.dumps(check_data(data(GOOD, EMPTY), tmp_path, counter=counter).to_dict()))
    assert found["entries"] == 2 and found["samples"] == 1 and found["tokens"]["counted"] == 1
    assert found["lost"] == {"an answer is empty": {"count": 1, "first_entries": [1]}}


def test_samples_of_lost_entries_can_be_left_out(data, tmp_path):
    found = check_data(data(GOOD, EMPTY, TEXT, GOOD), tmp_path, keep=True)
    found.leave_out({1, 2})
    assert list(found.numbers) == [0, 3] and found.samples == [GOOD, GOOD]


def test_many_entries_show_a_progress_bar(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MANY", 2)
    check_data(data(GOOD, GOOD), tmp_path)
    assert "Checking" not in capsys.readouterr().err
    check_data(data(GOOD, GOOD, GOOD), tmp_path)
    assert "Checking the data" in capsys.readouterr().err
