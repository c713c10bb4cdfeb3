"""The advice of `llava-mixlora interference`: from figures that are known, and of adapters that are trained."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from llava_mixlora.analysis.interference_estimate import estimate
from llava_mixlora.analysis.recommendation import (
    BY_INSTRUCTION,
    BY_LABELS,
    BY_PICTURE,
    BY_WORDS,
    COMPARE,
    PLAIN,
    recommend,
)
from llava_mixlora.analysis.separability import Separability, Told
from llava_mixlora.cli import main
from llava_mixlora.inference.loading import load_for_inference
from llava_mixlora.inference.samples import SampleSource, batches

WORDS = ("red", "green", "blue", "circle")
KEYS = ("human", "chat", "assistant", "between")
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
STEPS, RATE = 300, 5e-3
DECODER = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # not the tower, which has a q_proj too


def told(share, count=400, reach=0.02):
    return Told(share, max(0.0, share - reach), min(1.0, share + reach), 0.25, count)


NAMED = Separability(told(1.0), None, told(0.25), likeness=1.0, wordings=1.0, shared_wordings=0.0)
PARAPHRASED = replace(NAMED, new_wordings=told(0.7), likeness=0.3, wordings=6.0)


def conflict_of(*directions, noise=0.2, batches=8):
    """Measured on gradients around each task's direction."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(directions, dtype=torch.float64).unsqueeze(1)
    means = torch.nn.functional.pad(means, (0, 16 - means.shape[-1]))
    drawn = means + noise * torch.randn(len(directions), batches, 16, generator=generator, dtype=torch.float64)
    return estimate(torch.einsum("ibd,jcd->ibjc", drawn, drawn))


def advised(conflict, found=NAMED, routed=False):
    tasks = [f"task {number}" for number in range(len(conflict.measurable))]
    return recommend(tasks, conflict, [conflict], found, routed)


OPPOSED = conflict_of([1, 0], [-1, 0], [0, 1], [0, -1])


def test_tasks_that_harm_each_other_are_told_to_route():
    found = advised(OPPOSED)
    assert (found.verdict, found.option) == ("interfere", BY_WORDS)
    assert found.figures["from_others"] == pytest.approx(-1, abs=0.2)
    assert found.figures["harmed_tasks"] == [f"task {number}" for number in range(4)]
    assert found.figures["harmed_layers"] == 1
    assert found.text.startswith("These tasks interfere: ") and COMPARE in found.text
    assert "100% (95% interval 98% to 100%, chance 25%, n=400), where each task has one wording" in found.text


def test_parts_of_one_task_are_told_to_take_a_plain_lora():
    found = advised(conflict_of([1], [1], [1]))
    assert (found.verdict, found.option) == ("alike", PLAIN)
    assert found.figures["alike"] == pytest.approx(1, abs=0.1) and "mixlora" not in found.text


def test_tasks_with_nothing_in_common_start_with_a_plain_lora():
    """Routes are named for the case that it stays behind."""
    found = advised(conflict_of([1, 0, 0], [0, 1, 0], [0, 0, 1]))
    assert (found.verdict, found.option) == ("apart", PLAIN)
    assert BY_WORDS in found.text


def test_one_harmed_task_of_many_is_named_and_does_not_decide():
    """Task 0 loses to the last two; these help each other, as the rest do."""
    found = advised(conflict_of([1, 0, 0], *[[0, 1, 0]] * 3, *[[-0.4, 0, 1]] * 2, noise=0.1))
    assert found.verdict == "apart" and found.figures["harmed_tasks"] == ["task 0"]
    assert "clearly harmed: task 0" in found.text


@pytest.mark.parametrize("conflict", [conflict_of([0], [0], [0]), conflict_of([1], [0], [0], [0])])
def test_tasks_that_are_mostly_not_measurable_are_left_open(conflict):
    found = advised(conflict)
    assert (found.verdict, found.option) == ("unclear", None)
    assert "not enough data to tell" in found.text


def test_sum_that_noise_could_make_is_left_open():
    noisy = replace(OPPOSED, from_others=torch.full((4,), -0.6), from_others_error=torch.full((4,), 0.4))
    found = advised(replace(noisy, mean_from_others=-0.6, mean_from_others_error=0.35))
    assert (found.verdict, found.option) == ("unclear", None) and "-0.60 ± 0.35" in found.text


@pytest.mark.parametrize(
    ("found", "option", "words"),
    [
        (PARAPHRASED, BY_LABELS, "6.0 for a task, with a mean cosine of 0.30"),
        (replace(NAMED, words=told(0.3), picture=told(0.9)), BY_PICTURE, "pictures, which tell the tasks"),
        (replace(NAMED, words=told(0.3), shared_wordings=0.1), BY_INSTRUCTION, "not measured here"),
        (replace(NAMED, words=told(0.2), shared_wordings=1.0), None, "routing would not help"),
        (replace(NAMED, words=None, picture=None, shared_wordings=1.0), None, "routing would not help"),
        (replace(NAMED, words=told(0.6, count=9, reach=0.3)), None, "not enough data to tell whether routes"),
    ],
)
def test_option_follows_what_tells_the_tasks_apart(found, option, words):
    advice = advised(OPPOSED, found)
    assert advice.option == option and words in advice.text
    assert (COMPARE in advice.text) == (option is not None)


def test_routes_of_the_measured_adapter_are_mentioned():
    assert "own routes" in advised(OPPOSED, routed=True).text and "own routes" not in advised(OPPOSED).text


def test_lines_keep_flags_whole_and_end_in_the_option():
    lines = list(advised(OPPOSED).lines())
    assert lines[-1].strip() == BY_WORDS and all(len(line) <= 120 for line in lines[:-1])
    assert all(not line.endswith("-") for line in lines)
    assert " ".join(advised(OPPOSED).headline(60).split("\n")) == f"These tasks interfere; advised: {BY_WORDS}"
    assert max(map(len, advised(OPPOSED).headline(60).split("\n"))) <= 60


def conversation(picture, book, task, key):
    answer = WORDS[(picture + book) % len(WORDS)]
    turns = [{"from": "human", "value": f"<image>\nwhat {key} is the shape"}, {"from": "gpt", "value": answer}]
    return {"id": f"{task} {picture}", "image": f"{picture}.png", "task": task, "conversations": turns}


@pytest.fixture(scope="module")
def code_books(tmp_path_factory):
    """Four tasks that give the same four colours other words each, and one of them cut into four by its key word."""
    place = tmp_path_factory.mktemp("code-books")
    for number in range(64):
        Image.new("RGB", (16, 16), COLOURS[number % 4]).save(place / f"{number}.png")
    books = [conversation(n, book, key, key) for book, key in enumerate(KEYS) for n in range(64)]
    parts = [conversation(n, 0, f"part {part}", KEYS[0]) for part in range(4) for n in range(64)]
    (place / "books.json").write_text(json.dumps(books))
    (place / "parts.json").write_text(json.dumps(parts))
    return place


@pytest.fixture(scope="module")
def one_for_all(patched, llava_folder, code_books, tmp_path_factory):
    """A plain LoRA trained on all four books, until what they share is learnt."""
    torch.manual_seed(0)
    tokenizer, model, processor = load_for_inference(llava_folder)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=DECODER, task_type="CAUSAL_LM"))
    samples = [conversation(n, book, key, key) for book, key in enumerate(KEYS) for n in range(4)]
    given = SampleSource("", str(code_books), version="llava_v1", batch_size=len(samples))
    (batch,) = batches(samples, (tokenizer, model, processor), given, "Reading")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)  # settles between the books
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    folder = tmp_path_factory.mktemp("llava-lora")
    model.config.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("data", "verdict", "option"), [("books", "interfere", BY_WORDS), ("parts", "alike", PLAIN)])
def test_contradictory_tasks_and_parts_of_one_are_told_apart(
    one_for_all, code_books, llava_folder, tmp_path, capsys, data, verdict, option
):
    """The same adapter, pictures and number of tasks: only the data decide."""
    given = ["--data", code_books / f"{data}.json", "--image-folder", code_books, "--version", "llava_v1"]
    given += ["--model-base", llava_folder, "--batch-size", 16, "--output", tmp_path / "out"]
    assert main(["interference", str(one_for_all), *map(str, given)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "interference.json").read_text())["recommendation"]
    assert (found["verdict"], found["option"]) == (verdict, option)
    assert " ".join(printed.partition("Recommendation\n")[2].split()).startswith(found["text"])
    figures = found["figures"]
    assert figures["picture"]["share"] == pytest.approx(0.25), "every picture is shown in every task"
    if data == "books":
        assert figures["words"]["share"] == 1 and figures["likeness"] == pytest.approx(1)
        assert figures["from_others"] + 2 * figures["from_others_error"] < 0
    else:
        assert figures["words"]["share"] == pytest.approx(0.25) and figures["shared_wordings"] == 1
        assert figures["alike"] == pytest.approx(1, abs=0.25)
