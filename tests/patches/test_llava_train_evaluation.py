"""The flags of held-out data, next to transformers' own; whole runs are in tests/end_to_end/test_held_out.py."""

import pytest
import transformers

from ..tiny import message_of


@pytest.fixture
def parse(patched, tmp_path):
    """Parses flags as upstream's train() does; gives when is evaluated: strategy, steps, metric of the best."""
    from llava.train import train

    def parse(*flags):
        words = ["--output_dir", str(tmp_path), "--use_cpu", "--lora_enable", "--eval_data_path", "held.json", *flags]
        (found,) = transformers.HfArgumentParser(train.TrainingArguments).parse_args_into_dataclasses(words)
        strategy = getattr(found, "eval_strategy", None) or found.evaluation_strategy
        return str(getattr(strategy, "value", strategy)), found.eval_steps, found.metric_for_best_model

    return parse


@pytest.mark.parametrize("none", [(), ("--evaluation_strategy", "no")], ids=["not given", "as in upstream's scripts"])
@pytest.mark.parametrize(
    ("saves", "evaluates"),
    [
        (("--save_strategy", "steps", "--save_steps", "7"), ("steps", 7)),
        (("--save_strategy", "epoch"), ("epoch", None)),
        (("--save_strategy", "no"), ("epoch", None)),
        (("--save_strategy", "epoch", "--eval_steps", "3"), ("steps", 3)),
    ],
)
def test_held_out_data_are_evaluated_when_checkpoints_are_saved(parse, none, saves, evaluates):
    assert parse(*none, *saves)[:2] == evaluates


def test_given_times_of_evaluation_stay(parse):
    flags = ("--save_strategy", "steps", "--save_steps", "7")
    assert parse(*flags, "--evaluation_strategy", "steps", "--eval_steps", "2")[:2] == ("steps", 2)
    assert parse(*flags, "--evaluation_strategy", "epoch")[0] == "epoch"


def test_best_is_by_the_loss_unless_said_otherwise(parse):
    assert parse("--early_stopping_patience", "2")[2] == "loss"
    assert parse("--load_best_model_at_end", "True")[2] == "loss"
    assert parse("--early_stopping_patience", "2", "--metric_for_best_model", "exact_match")[2] == "exact_match"
    assert parse()[2] is None


def test_patience_of_nothing_is_refused(parse):
    assert "--early_stopping_patience 0" in message_of(parse, "--early_stopping_patience", "0")


def test_best_that_is_never_saved_is_one_line(parse):
    said = message_of(parse, "--load_best_model_at_end", "True", "--save_strategy", "no")
    assert said.startswith("--load_best_model_at_end")
