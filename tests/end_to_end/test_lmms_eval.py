"""`llava-mixlora run -m lmms_eval`: the unmodified harness asks an adapter, with no network."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import easy_vqa
import pytest
import torch

from llava_mixlora.evaluation.answering import answer
from llava_mixlora.evaluation.metrics import exact_match
from llava_mixlora.evaluation.questions import Question

from ..tiny import write_adapter
from .training import environment, program

TASKS = Path(__file__).parents[2] / "playground" / "lmms_tasks"
REAL_PICTURES = Path(easy_vqa.__file__).parent / "data" / "test" / "images"
PROMPTS = [
    ("shape", "what shape is this?"),
    ("color", "what color is the shape, red or green or blue?"),
    ("shape", "what?"),
    ("color", "a chat: what color is the circle in this picture?"),
    ("shape", "is the blue shape a square or a circle?"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy", "no_proxy"), "http://127.0.0.1:9")}
BATCH, TOKENS = 3, 16
"""How many questions the harness puts at a time, and the longest answer by the task's own words."""


@pytest.fixture(scope="module")
def adapter(llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp("llava-mixlora"))


@pytest.fixture(scope="module")
def loaded(adapter, patched):
    """The adapter as the harness loads it on a CPU, in half precision."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(adapter), None, "llava", device_map="auto", device="cpu")[:3]


@pytest.fixture(scope="module")
def questions():
    """Questions of different lengths about real pictures."""
    return [Question(str(n), task, text, REAL_PICTURES / f"{n}.png") for n, (task, text) in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone(loaded, questions):
    """Our answers, one question at a time."""
    asked = answer(loaded, questions, batch_size=1, max_new_tokens=TOKENS, progress=False)
    return [text for _, (text,) in asked]


@pytest.fixture(scope="module")
def decided(loaded, questions, alone):
    """Numbers of the questions that half precision decides: of others the answer changes with how many are asked."""
    batched = []
    for count in range(2, len(questions) + 1):
        asked = answer(loaded, questions, batch_size=count, max_new_tokens=TOKENS, progress=False)
        batched.append([text for _, texts in asked for text in texts])
    return [number for number, text in enumerate(alone) if all(texts[number] == text for texts in batched)]


@pytest.fixture(scope="module")
def finished(adapter, questions, alone, tmp_path_factory):
    """Results and answers of the playground's task, on data in which the model's answer is right for two of five."""
    place = tmp_path_factory.mktemp("playground")
    data = place / "cache" / "data"
    (data / "images").mkdir(parents=True)
    samples = []
    for number, (question, text) in enumerate(zip(questions, alone)):
        shutil.copy(question.image, data / "images")
        turns = [("human", f"<image>\n{question.prompt}"), ("gpt", text if number in (0, 2) else "none of these")]
        conversation = [{"from": speaker, "value": value} for speaker, value in turns]
        samples.append(
            {"id": question.id, "image": question.image.name, "task": question.task, "conversations": conversation}
        )
    (data / "heldout.json").write_text(json.dumps(samples))
    shutil.copytree(TASKS, place / "lmms_tasks")
    words = ["--model", "llava", "--tasks", "playground_heldout", "--include_path", str(place / "lmms_tasks")]
    words += ["--model_args", f"pretrained={adapter},conv_template=llava_v1,device_map=auto,device=cpu"]
    words += ["--batch_size", str(BATCH), "--output_path", str(place / "results"), "--log_samples"]
    done = subprocess.run(
        [program("llava-mixlora"), "run", "-m", "lmms_eval", *words],
        env={**environment(), **OFFLINE, "HF_HOME": str(place / "huggingface")},
        capture_output=True,
        text=True,
    )
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    (results,) = list((place / "results").rglob("*_results.json")) or pytest.fail(said)  # its status is 0 when it fails
    (lines,) = (place / "results").rglob("*_samples_playground_heldout.jsonl")
    answers = sorted(map(json.loads, lines.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"]["playground_heldout"], answers


def test_answers_in_its_batches_are_ours_to_each_question_alone(finished, alone, decided):
    _, answers = finished
    given = [line["filtered_resps"] for line in answers]
    assert len(given) == len(alone) and len(decided) >= 3
    assert [given[n] for n in decided] == [alone[n] for n in decided]


def test_adapter_is_what_answers(finished, loaded, questions):
    _, answers = finished
    with loaded[1].disable_adapter():
        asked = answer(loaded, questions, batch_size=1, max_new_tokens=TOKENS, progress=False)
        of_base = [text for _, (text,) in asked]
    assert all(line["filtered_resps"] != text for line, text in zip(answers, of_base))


def test_results_are_exact_matches_of_all_questions_and_of_each_task(finished):
    results, answers = finished
    assert results["exact_match,none"] == 2 / 5
    assert results["shape,none"] == 2 / 3 and results["color,none"] == 0
    assert [line["exact_match"] for line in answers] == [
        exact_match(line["filtered_resps"], line["target"]) for line in answers
    ]


def test_each_question_in_a_batch_takes_the_routes_it_takes_alone(adapter, loaded, questions):
    from lmms_eval.models.simple.llava import Llava
    from PIL import Image

    harness = Llava(str(adapter), device="cpu", device_map="auto", batch_size=len(questions), conv_template="llava_v1")
    harness.task_dict = {"task": {"split": [[Image.open(q.image).convert("RGB")] for q in questions]}}

    def routes(chosen, batch_size):
        harness.batch_size_per_gpu = batch_size
        arguments = [(questions[n].prompt, {"max_new_tokens": 2}, list, n, "task", "split") for n in chosen]
        harness.generate_until([SimpleNamespace(args=words) for words in arguments])
        return harness.model.base_model.routes()

    # The harness begins with the longest question.
    order = sorted(range(len(questions)), key=lambda n: -len(harness.tok_encode(questions[n].prompt)))
    together = routes(order, len(order))
    for row, number in enumerate(order):
        for name, route in routes([number], 1).items():
            assert torch.equal(together[name].index_A[row], route.index_A[0])
            assert torch.equal(together[name].index_B[row], route.index_B[0])
    assert any(len(route.index_A.unique(dim=0)) > 1 for route in together.values())
