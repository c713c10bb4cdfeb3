"""`llava-mixlora eval`: answers in batches and by several processes, and runs that go on after they were killed."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_mixlora import MixLoraError
from llava_mixlora.cli import main
from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.evaluate import Asking, evaluate
from llava_mixlora.evaluation.judge import QUESTION
from llava_mixlora.evaluation.questions import Question, read_questions
from llava_mixlora.inference.loading import load_for_inference

from ...end_to_end.training import environment, program
from ...tiny import draw_pictures, write_adapter

TASKS = {"color": "red", "presence": "yes"}


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory):
    """Twelve questions of different lengths about different pictures, of two tasks."""
    place = tmp_path_factory.mktemp("questions")
    draw_pictures(place, 12)
    records = []
    for number in range(12):
        task = list(TASKS)[number % 2]
        text = "what color is the shape" + " red green blue circle"[: 5 * (number % 4)]
        record = {"question_id": number, "image": f"{number}.png", "text": text, "category": task}
        records.append({**record, "answer": TASKS[task]})
    file = place / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def model(llava_folder, tmp_path_factory):
    return str(write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora")))


def words(model, questions_file, output, *more):
    given = ["eval", "--model-path", model, "--questions", str(questions_file), "--output", str(output)]
    return [*given, "--max-new-tokens", "6", "--batch-size", "5", *more]


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model, questions_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores")
    assert main(words(model, questions_file, output)) == 0
    return output


def test_every_question_is_answered_once_and_scored(finished, questions_file):
    found = lines(finished)
    assert [line["question_id"] for line in found] == [str(number) for number in range(12)]
    assert len({line["text"] for line in found}) > 1
    scores = json.loads((finished / "scores.json").read_text())
    assert {task: row["questions"] for task, row in scores["tasks"].items()} == {"color": 6, "presence": 6}
    assert {"exact", "contained"} <= scores["tasks"]["color"].keys() and "f1" not in scores["tasks"]["color"]
    assert scores["tasks"]["presence"]["yes_share"] >= 0
    assert (finished / "scores.md").read_text().startswith("| task | questions | exact | contained |")
    assert not list(finished.glob("*.part-*"))


def test_answers_in_batches_are_those_given_alone(model, questions_file, finished):
    loaded = load_for_inference(model)
    alone = {}
    for (question,), (text,) in answer(loaded, read_questions(questions_file), batch_size=1, max_new_tokens=6):
        alone[question.id] = text
    assert alone == {line["question_id"]: line["text"] for line in lines(finished)}


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(model, questions_file, finished, tmp_path):
    launcher = [program("torchrun"), "--standalone", "--nproc_per_node=2", "-m", "llava_mixlora"]
    done = subprocess.run(
        [*launcher, *words(model, questions_file, tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(tmp_path) == lines(finished)
    assert (tmp_path / "scores.json").read_text() == (finished / "scores.json").read_text()


KILLED = """
import os, signal, sys
from llava_mixlora.evaluation import answering
from llava_mixlora.cli import main
answer = answering.answer
def killed(*arguments, **options):
    for number, batch in enumerate(answer(*arguments, **options)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
answering.answer = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_run_loses_no_answer_and_asks_none_twice(model, questions_file, finished, tmp_path, monkeypatch, capsys):
    run = words(model, questions_file, tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, *run], env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (part,) = tmp_path.glob("answers.part-*")
    kept = part.read_text()
    assert kept.count("\n") == 5
    part.write_text(kept + '{"question_id": "1')  # as if it had been killed within a line
    assert main(run) == 0
    assert "5 of 12 questions have been answered before" in capsys.readouterr().out
    assert lines(tmp_path) == lines(finished)
    assert main(run) == 0  # nothing is left to ask: no model is needed
    assert "12 of 12" in capsys.readouterr().out and lines(tmp_path) == lines(finished)


def verdicts_one_by_one(judge, folder):
    tokenizer, model = AutoTokenizer.from_pretrained(judge), AutoModelForCausalLM.from_pretrained(judge)
    verdicts = {}
    for line in lines(folder):
        text = QUESTION.format(prompt=line["prompt"], target=line["metadata"]["target"], answer=line["text"])
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        yes, no = (tokenizer.encode(word, add_special_tokens=False)[-1] for word in (" yes", " no"))
        verdicts[line["question_id"]] = bool(logits[yes] > logits[no])
    return verdicts


def test_judge_decides_beside_the_metrics(model, questions_file, finished, llama_folder, tokenizer_folder, tmp_path):
    judge = tmp_path / "judge"
    judge.mkdir()
    for folder in (llama_folder, tokenizer_folder):
        for file in folder.iterdir():
            (judge / file.name).write_bytes(file.read_bytes())
    run = words(model, questions_file, finished, "--judge", str(judge))
    assert main(run) == 0
    scores = json.loads((finished / "scores.json").read_text())
    assert all(0 <= row["judged"] <= 100 for row in scores["tasks"].values())
    verdicts = (finished / "judged.jsonl").read_text()
    found = {line["key"][1]: line["right"] for line in map(json.loads, verdicts.splitlines())}
    assert found == verdicts_one_by_one(judge, finished)
    (judge / "model.safetensors").unlink()  # all verdicts are there: the judge is not asked again
    assert main(run) == 0 and (finished / "judged.jsonl").read_text() == verdicts
    assert json.loads((finished / "scores.json").read_text()) == scores


def test_answers_of_another_run_are_kept_and_named(model, questions_file, finished, capsys):
    before = (finished / "answers.jsonl").read_text()
    assert main([*words(model, questions_file, finished), "--conv-mode", "plain"]) == 1
    assert "conversation is 'llava_v1' there, but 'plain' here" in capsys.readouterr().err
    assert main([*words(model, questions_file, finished), "--task", "color"]) == 1
    assert "holds answers to other questions" in capsys.readouterr().err
    assert (finished / "answers.jsonl").read_text() == before


def test_what_cannot_be_loaded_is_one_line(model, questions_file, tmp_path, capsys):
    assert main(words("./absent", questions_file, tmp_path / "a")) == 1
    assert "--model-path ./absent: no such folder" in capsys.readouterr().err
    assert main([*words(model, questions_file, tmp_path / "b"), "--conv-mode", "v9"]) == 1
    assert "--conv-mode v9: no such template" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main(words(model, questions_file, tmp_path / "file" / "scores")) == 1
    assert "choose another --output" in capsys.readouterr().err
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    damaged = [Question("d", "t", "what?", tmp_path / "damaged.png")]
    with pytest.raises(MixLoraError, match="not an image"):
        evaluate(Asking(model), damaged, tmp_path / "c")


def test_merged_model_is_evaluated_too(model, questions_file, tmp_path):
    from llava_mixlora.merging.merge import merge

    merge(model, None, tmp_path / "llava-merged", force=True)
    assert main(words(str(tmp_path / "llava-merged"), questions_file, tmp_path / "scores")) == 0
    assert len(lines(tmp_path / "scores")) == 12
    assert torch.tensor([bool(line["text"]) for line in lines(tmp_path / "scores")]).any()


@pytest.mark.parametrize(
    ("text", "words_of_error"),
    [
        ("{", "not valid JSON"),
        ('{"peft_type": "MIXLORA", "num_factors": "8"}', "num_factors='8'"),
        ('{"peft_type": "MIXLORA", "target_modules": "(.*)*x"}', "could take minutes"),
        ("[" * 10**5, "nested more than 64 deep"),
    ],
)
def test_adapter_whose_configuration_is_damaged_is_one_line_and_nothing_is_written(
    model, questions_file, tmp_path, capsys, text, words_of_error
):
    broken = shutil.copytree(model, tmp_path / "llava-broken-mixlora")
    (broken / "adapter_config.json").write_text(text)
    assert main(words(str(broken), questions_file, tmp_path / "scores")) == 1
    said = capsys.readouterr().err
    assert words_of_error in said and said.count("\n") == 1 and not (tmp_path / "scores").exists()


def test_incomplete_adapter_is_asked_only_where_that_is_meant(model, questions_file, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "llava-broken-mixlora")
    (broken / "non_lora_trainables.bin").unlink()
    assert main(words(str(broken), questions_file, tmp_path / "scores")) == 1
    assert "lacks model.mm_projector.0.weight" in capsys.readouterr().err
    assert main(words(str(broken), questions_file, tmp_path / "scores", "--allow-incomplete", "--limit", "1")) == 0
