"""The best evaluation so far, and how long ago it was; whole runs are in tests/end_to_end/test_held_out.py."""

import math
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from llava_mixlora.training.best_checkpoint import EarlyStopping, KeepBest, evaluations, evaluations_since_best


@pytest.mark.parametrize(
    ("values", "of_loss", "of_share"),
    [
        ([], 0, 0),
        ([3.0], 0, 0),
        ([3.0, 2.0, 2.5], 1, 2),
        ([1.0, 1.0, 1.0], 2, 2),  # no better is no better
        ([math.nan, 2.0, math.nan], 1, 1),
        ([math.nan, math.nan], 2, 2),
    ],
)
def test_evaluations_since_the_best(values, of_loss, of_share):
    assert evaluations_since_best(values, greater_is_better=False) == of_loss
    assert evaluations_since_best(values, greater_is_better=True) == of_share


def arguments(**options):
    chosen = {"metric_for_best_model": "loss", "greater_is_better": False, "load_best_model_at_end": True}
    return SimpleNamespace(**{**chosen, "eval_strategy": "steps", "eval_delay": 0, **options})


def state(*losses, **options):
    history = [{"step": 1, "loss": 9.0}, *({"step": 1, "eval_loss": loss} for loss in losses)]
    return TrainerState(log_history=history, is_world_process_zero=True, **options)


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_metric_is_found_with_its_prefix_and_without(metric):
    assert evaluations(arguments(metric_for_best_model=metric), state(2.0, 1.0)) == [2.0, 1.0]


@pytest.mark.parametrize(("losses", "ends"), [((3.0, 4.0), False), ((3.0, 4.0, 3.5), True), ((3.0, 4.0, 2.0), False)])
def test_run_ends_when_patience_has_run_out(capsys, losses, ends):
    control = TrainerControl()
    EarlyStopping(2).on_evaluate(arguments(), state(*losses), control)
    assert control.should_training_stop == ends
    assert ("--early_stopping_patience" in capsys.readouterr().out) == ends


def test_run_that_goes_on_has_the_patience_that_was_left():
    control = TrainerControl()
    EarlyStopping(2).on_train_begin(arguments(), state(3.0, 4.0), control)
    assert not control.should_training_stop
    EarlyStopping(2).on_train_begin(arguments(), state(3.0, 4.0, 5.0), control)
    assert control.should_training_stop


@pytest.mark.parametrize(("losses", "saves"), [((3.0,), True), ((3.0, 4.0), False), ((3.0, 4.0, 2.0), True)])
def test_best_is_saved_when_it_is_found(losses, saves):
    control = TrainerControl()
    KeepBest().on_evaluate(arguments(), state(*losses), control)
    assert control.should_save == saves
    control = TrainerControl()
    KeepBest().on_evaluate(arguments(load_best_model_at_end=False), state(*losses), control)
    assert not control.should_save


def test_last_step_is_evaluated_whatever_divides_it():
    for step, evaluates in ((7, True), (6, False)):
        control = TrainerControl()
        KeepBest().on_step_end(arguments(), state(global_step=step, max_steps=7), control)
        assert control.should_evaluate == evaluates
