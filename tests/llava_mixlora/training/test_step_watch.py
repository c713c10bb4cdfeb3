"""Steps that teach nothing, and losses that are no number, do not pass in silence."""

import pytest
import torch

from llava_mixlora.training.step_watch import IN_A_ROW, StepWatch

from ...tiny import message_of

pytestmark = pytest.mark.one_stack


def batch(*rows):
    """Rows of (token, supervised?); -200 stands for an image."""
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    supervised = torch.tensor([[is_supervised for _, is_supervised in row] for row in rows])
    return {"input_ids": ids, "labels": ids.where(supervised, -100)}


EMPTY = batch([(5, False), (6, False)], [(7, False), (8, False)])
FULL = batch([(5, False), (6, False)], [(7, False), (8, True)])


def test_a_batch_without_supervised_tokens_is_named_with_its_step(capsys):
    watch = StepWatch(image_tokens=4, limit=8)
    assert watch.teaches(FULL, 1) and capsys.readouterr().out == ""
    assert not watch.teaches(EMPTY, 2)
    assert "step 2: none of the 2 samples" in capsys.readouterr().out


@pytest.mark.parametrize("limit, teaches", [(5, False), (6, True)])
def test_features_of_images_count_against_the_limit(limit, teaches):
    row = [(-200, False), (5, False), (6, True)]  # with 4 features, the supervised token has place 5
    assert StepWatch(image_tokens=4, limit=limit).teaches(batch(row), 1) is teaches


def test_a_run_stops_when_it_goes_on_learning_nothing(capsys):
    watch = StepWatch(image_tokens=4, limit=8)
    for step in range(IN_A_ROW - 1):
        watch.teaches(EMPTY, step)
    assert watch.teaches(FULL, IN_A_ROW)  # begins anew
    for step in range(IN_A_ROW - 1):
        watch.teaches(EMPTY, step)
    assert f"the last {IN_A_ROW} batches had no token" in message_of(watch.teaches, EMPTY, 99)
    assert capsys.readouterr().out.count("\n") == IN_A_ROW


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run(value):
    watch = StepWatch(image_tokens=4, limit=8)
    watch.check_loss(torch.tensor(1.0), 1)
    message = message_of(watch.check_loss, torch.tensor(float(value)), 2)
    assert f"step 2: the loss is {value}" in message and "--learning_rate" in message


def test_half_precision_may_overflow_now_and_then():
    watch = StepWatch(image_tokens=4, limit=8, half_precision=True)
    for _ in range(3):
        for step in range(IN_A_ROW - 1):
            watch.check_loss(torch.tensor(float("inf")), step)
        watch.check_loss(torch.tensor(1.0), IN_A_ROW)
    for step in range(IN_A_ROW - 1):
        watch.check_loss(torch.tensor(float("inf")), step)
    assert "the loss is inf" in message_of(watch.check_loss, torch.tensor(float("inf")), IN_A_ROW)
