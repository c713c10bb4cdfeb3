"""`llava-mixlora check` tells what a run would make of data."""

import json

import pytest

from llava_mixlora.cli import main

TURNS = [{"from": "human", "value": "what color"}, {"from": "gpt", "value": "red"}]
GOOD, EMPTY = {"conversations": TURNS}, {"conversations": [TURNS[0], {"from": "gpt", "value": ""}]}


@pytest.fixture
def data(tmp_path):
    def data(name, *found):
        (tmp_path / name).write_text(json.dumps(found))
        return str(tmp_path / name)

    return data


def test_every_file_is_told_before_one_is_refused(data, capsys):
    bad, good = data("bad.json", GOOD, EMPTY), data("good.json", GOOD)
    assert main(["check", good]) == 0
    assert f"{good}: 1 entries" in capsys.readouterr().out
    assert main(["check", bad, good]) == 1
    told = capsys.readouterr()
    assert f"{bad}: 2 entries" in told.out and f"{good}: 1 entries" in told.out
    assert f"{bad}: entry 1: an answer is empty" in told.err and "--max-lost-share 0.01" in told.err
    assert main(["check", bad, "--max-lost-share", "0.5"]) == 0


def test_tokens_are_counted_with_the_tower_that_the_model_names(data, capsys, llava_folder):
    words = ["check", data("data.json", GOOD), "--model-path", str(llava_folder), "--json"]
    assert main(words) == 0
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    tokens = json.loads(line)["tokens"]
    assert tokens["image_tokens"] == 4 and tokens["limit"] == 2048 and tokens["supervised"] > 1


def test_a_model_without_a_tokenizer_is_named(data, capsys, tmp_path):
    assert main(["check", data("data.json", GOOD), "--model-path", str(tmp_path)]) == 1
    assert f"--model-path {tmp_path}: its tokenizer" in capsys.readouterr().err
