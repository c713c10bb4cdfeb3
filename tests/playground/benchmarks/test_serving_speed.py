"""`benchmark serve` with a tiny model: real servers take turns, and what they answer is compared with eval's."""

import json
import subprocess
import sys

import pytest

from playground.benchmarks.benchmark import main
from playground.benchmarks.serving_speed import IN_PROCESS, WORKER, Answered, compare, markdown
from tests.tiny import draw_pictures, write_adapter

QUESTIONS = ["what color is the shape?", "red green blue"]


@pytest.fixture
def place(tmp_path, llava_folder):
    write_adapter(llava_folder, tmp_path / "mine", pairing="same", router_scope="instruction", router_input="words")
    (tmp_path / "images").mkdir()
    draw_pictures(tmp_path / "images", 2)
    samples = [
        {
            "id": question,
            "image": f"{number}.png",
            "task": "shape",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "red"}],
        }
        for number, question in enumerate(QUESTIONS)
    ]
    (tmp_path / "heldout.json").write_text(json.dumps(samples))
    return tmp_path


def benchmark(place, *flags):
    words = ["serve", "--model", place / "mine", "--data", place, "--rounds", "1", "--output", place / "out.json"]
    command = [sys.executable, "-m", "playground.benchmarks.benchmark", *map(str, words), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_servers_are_started_asked_and_ended(place):
    done = benchmark(place, "--at-a-time", "1", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((place / "out.json").read_text())
    rows = {(row["server"], row["at_a_time"]): row for row in found["results"]}
    assert set(rows) == {(server, number) for server in (WORKER, IN_PROCESS) for number in (1, 2)}
    for row in rows.values():
        assert row["requests_per_second"] > 0 and row["first_token_milliseconds"] > 0
    assert rows[IN_PROCESS, 2]["same_answers"] == len(QUESTIONS)
    assert rows[WORKER, 1]["ratio"] == rows[WORKER, 2]["ratio"] == 1
    assert markdown(found) in done.stdout and found["machine"]["cores"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--merged", "somewhere"], "--engine-python PYTHON too"),
        (["--merged", "nowhere", "--engine-python", sys.executable], "--merged nowhere: no such folder"),
        (["--engine-python", "none"], "none: no such program"),
        (["--at-a-time", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_named(flags, problem, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "serve", *flags])
    assert main() == 1
    assert problem in capsys.readouterr().err


def test_rows_come_in_the_order_of_the_servers_whoever_begins():
    servers = {name: lambda asked, name=name: Answered(name, 0.5) for name in (WORKER, "other")}
    rows = compare(servers, ["x", "y"], [WORKER, "other"], [1], rounds=2)
    assert [row["server"] for row in rows] == [WORKER, "other"]
    assert [row["same_answers"] for row in rows] == [1, 1] and rows[0]["ratio"] == 1
    assert {row["first_token_milliseconds"] for row in rows} == {500}
