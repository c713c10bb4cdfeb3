"""Held-out data: what is counted in a forward pass, and flags and data that cannot be meant."""

import json
import random

import numpy
import pytest
import torch
from transformers import EvalPrediction

from llava_mixlora.data.check import check_data
from llava_mixlora.training.held_out import (
    TASK_NUMBERS,
    HeldOutCollator,
    HeldOutData,
    HeldOutMetrics,
    check_held_out,
    check_metric,
    description,
    figures,
    labels_of_the_sequence,
    same_draws_afterwards,
    tasks_of,
)

from ...tiny import message_of

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A circle."}]


def saying(tokens, size=7):
    """Logits [1, S, V] whose likeliest next token is that of `tokens`."""
    return 3.0 * torch.nn.functional.one_hot(torch.tensor([[*tokens[1:], 0]]), size).float()


@pytest.mark.parametrize(
    ("labels", "said", "right", "answers"),
    [
        ([-100, -100, 3, 4, 5], [0, 0, 3, 4, 5], 1, 1),
        ([-100, -100, 3, 4, 5], [0, 0, 3, 4, 6], 0, 1),  # the token that ends an answer counts
        ([-100, -100, 3, 4, -100], [0, 0, 3, 4, 6], 1, 1),  # what follows it does not
        ([-100, 3, -100, 4, 5], [0, 3, 1, 4, 6], 1, 2),  # each turn of a conversation is an answer
        ([-100, 3, -100, 4, 5], [0, 3, 1, 4, 5], 2, 2),
        ([3, 4, -100, -100, -100], [0, 4, 0, 0, 0], 1, 1),  # nothing predicts the first token
        ([-100] * 5, [1] * 5, 0, 0),
    ],
)
def test_answer_is_right_when_each_of_its_tokens_is_the_likeliest(labels, said, right, answers):
    row = figures(saying(said), torch.tensor([labels]))
    assert row.shape == (1, 4) and row[0, 2:].tolist() == [right, answers]


def test_loss_is_that_of_the_supervised_tokens_whoever_shares_the_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[0, :3] = labels[1, :5] = labels[2] = -100
    rows = figures(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert rows[:, 1].tolist() == [3, 1, 0]
    torch.testing.assert_close(rows[:, 0].sum() / rows[:, 1].sum(), expected)
    alone = torch.cat([figures(logits[[i]], labels[[i]]) for i in range(3)])
    torch.testing.assert_close(rows, alone, rtol=0, atol=1e-6)


def test_metrics_are_of_all_answers_and_by_task():
    rows = numpy.array([[4.0, 2, 1, 1], [6.0, 2, 0, 1], [2.0, 4, 1, 2]], dtype=numpy.float32)
    numbers = numpy.array([[0], [0], [-1]])
    metrics = HeldOutMetrics(["vqa", "no sample has it"], "held.json")(EvalPrediction(rows, numbers))
    assert metrics == {"loss": 1.5, "exact_match": 0.5, "exact_match_vqa": 0.5}
    in_batches = EvalPrediction([rows[:2], rows[2:]], [numbers[:2], numbers[2:]])
    assert HeldOutMetrics(["vqa"], "held.json")(in_batches) == metrics


def test_held_out_data_without_any_answer_is_an_error_rather_than_a_loss():
    nothing = EvalPrediction(numpy.zeros((2, 4), numpy.float32), numpy.array([[-1], [-1]]))
    assert "held.json: no answer has a token" in message_of(HeldOutMetrics([], "held.json"), nothing)


def test_batches_of_held_out_data_tell_tasks_by_number_and_those_of_training_stay():
    samples = [{"id": 0, "task": "vqa"}, {"id": 1}, {"id": 2, "task": "ocr"}]
    data = HeldOutData(samples, tasks_of(samples))
    assert data.tasks == ["ocr", "vqa"] and len(data) == 3
    collate = HeldOutCollator(lambda batch: {"of training": batch}, lambda batch: {"held out": batch})
    batch = collate([data[i] for i in range(3)])
    assert batch[TASK_NUMBERS].tolist() == [[1], [-1], [0]]
    assert batch["held out"] == [{"id": 0}, {"id": 1}, {"id": 2}]
    assert collate(samples) == {"of training": samples}


class Samples(list):
    """As upstream's data set of them."""

    @property
    def list_data_dict(self):
        return self


def test_line_on_held_out_data_tells_of_samples_that_are_trained_on():
    samples = [{"image": f"{number}.png", "task": "vqa", "conversations": TURNS} for number in range(3)]
    held_out = HeldOutData(Samples(samples), tasks_of(samples))
    apart = Samples([{"image": "9.png", "conversations": TURNS}])
    assert description(held_out, apart, "held.json") == "held-out data: 3 samples, 1 tasks (held.json)"
    assert "note: 1 have the picture" in description(held_out, Samples(samples[:1]), "held.json")


@pytest.mark.parametrize("task", ["", "  ", 3, ["vqa"]])
def test_task_that_is_no_name_is_named(task):
    assert f"held.json: entry 1 has task={task!r}" in message_of(tasks_of, [{}, {"task": task}], "held.json")


def test_drawing_in_an_evaluation_leaves_the_generators_alone():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    expected = draw()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    with same_draws_afterwards(torch.device("cpu")):
        draw()
    assert draw() == expected


def test_labels_are_seen_where_image_features_stand_in_the_sequence(llava):
    ids = torch.tensor([[1, -200, 5, 6]])
    labels = torch.tensor([[-100, -100, 5, 6]])
    with torch.no_grad(), labels_of_the_sequence(llava) as seen:
        logits = llava(input_ids=ids, labels=labels, images=torch.rand(1, 3, 16, 16)).logits
    assert seen[0].shape == logits.shape[:2] and seen[0][0, -2:].tolist() == [5, 6]
    assert "prepare_inputs_labels_for_multimodal" not in vars(llava)


@pytest.fixture
def flags(tmp_path):
    """Flags of a run with held-out data of two tasks."""
    samples = [{"task": "vqa", "conversations": TURNS}, {"task": "ocr", "conversations": TURNS}]
    (tmp_path / "held.json").write_text(json.dumps(samples))
    return {"mixlora_enable": "True", "eval_data_path": str(tmp_path / "held.json")}


@pytest.mark.parametrize(
    "metric", [None, "loss", "eval_loss", "exact_match", "eval_exact_match", "eval_exact_match_vqa"]
)
def test_held_out_data_and_its_metrics_pass(flags, metric):
    flags |= {} if metric is None else {"metric_for_best_model": metric}
    check_held_out(flags)
    check_metric(flags, check_data(flags["eval_data_path"], keep=True))


def test_metric_that_will_not_be_there_is_named_with_those_that_will(flags):
    flags["metric_for_best_model"] = "eval_exact_match_vqav2"
    said = message_of(check_metric, flags, check_data(flags["eval_data_path"], keep=True))
    assert "eval_exact_match_vqav2" in said and "eval_exact_match_ocr, eval_exact_match_vqa" in said


def test_training_data_is_not_held_out(flags):
    assert "is --data_path too" in message_of(check_held_out, {**flags, "data_path": flags["eval_data_path"]})


@pytest.mark.parametrize(
    "asking",
    [
        {"evaluation_strategy": "steps"},
        {"eval_strategy": "epoch"},
        {"eval_steps": "5"},
        {"load_best_model_at_end": "True"},
        {"early_stopping_patience": "2"},
        {"metric_for_best_model": "eval_loss"},
        {"eval_image_folder": "images"},
    ],
)
@pytest.mark.parametrize("adapter", ["mixlora_enable", "lora_enable"])
def test_flags_that_need_held_out_data_are_named_where_there_is_none(adapter, asking):
    said = message_of(check_held_out, {adapter: "True", **asking})
    assert f"--{next(iter(asking))}" in said and "--eval_data_path" in said


def test_flags_that_ask_for_nothing_pass():
    check_held_out({"mixlora_enable": "True", "evaluation_strategy": "no", "load_best_model_at_end": "False"})
    check_held_out({"eval_steps": "5"})


def test_held_out_data_of_a_run_without_an_adapter_is_refused(flags):
    assert "--lora_enable True" in message_of(check_held_out, {**flags, "mixlora_enable": "False"})
