"""TRL's trainers: answers are routed by their prompts, and what cannot be is said.

Each run is made with the TRL that is installed and with TRL 0.24, which gives the model other inputs; that one has a
folder of its own, with the transformers that it needs, and runs in a program of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".stacks" / "trl-0.24"


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """Makes a run of trl_runs.py by its name, once, with the TRL that is installed."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    from . import trl_runs

    made, place = {}, tmp_path_factory.mktemp("trl")

    def run(name):
        if name not in made:
            made[name] = trl_runs.run(name, place)
        return made[name]

    return run


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Gives a run of trl_runs.py by its name that was made with TRL 0.24."""
    if not OLDER.is_dir():
        pytest.skip(f"TRL 0.24 is not in {OLDER.relative_to(ROOT)}")
    file = tmp_path_factory.mktemp("trl-0.24") / "runs.json"
    path = os.pathsep.join([str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.end_to_end.trl_runs", str(file)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["trl"] == "0.24.0"
    return lambda name: SimpleNamespace(**written["runs"][name])


@pytest.fixture(params=["newest", "older"])
def runs(request):
    """The same of either TRL."""
    return request.getfixturevalue(request.param)


def warned_of_prompt(run):
    return [text for text in run.warnings if "prompt" in text]


def told_of_balance(run):
    """Whether the user was told, by an error or a warning, that the balance term does not reach the loss."""
    told = [*run.warnings, *([run.error] if run.error and run.error.startswith("MixLoraError") else [])]
    return any("balance_loss_weight" in text for text in told)


def check_routed_as_alone(run):
    assert run.error is None
    assert len(run.alone) == 14  # seven linear layers in each of two decoder layers
    assert len({json.dumps(pair) for pools in run.alone.values() for pair in zip(*pools)}) > 20  # prompts differ
    assert run.routed == run.alone


def check_warned_once(run):
    assert run.error is None
    assert len(warned_of_prompt(run)) == 1
    assert "\n" not in warned_of_prompt(run)[0]


def check_close(actual, expected):
    assert len(actual) == len(expected) > 0
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-6, rtol=1e-3)


def differ(actual, expected):
    return not torch.allclose(torch.tensor(actual), torch.tensor(expected), atol=1e-3)


# --- which positions decide


@pytest.mark.parametrize("name", ["prompt-completion", "chat prompt-completion", "assistant only"])
def test_answers_are_routed_by_their_prompts(runs, name):
    check_routed_as_alone(runs(name))
    assert not warned_of_prompt(runs(name))


@pytest.mark.parametrize("name", ["packed", "padding-free"])
def test_samples_of_a_row_have_the_routes_that_they_have_alone(runs, name):
    check_routed_as_alone(runs(name))
    assert not warned_of_prompt(runs(name))


def test_preference_pairs_are_routed_by_their_prompts(newest):
    check_routed_as_alone(newest("dpo"))
    assert not warned_of_prompt(newest("dpo"))


def test_tokens_weighted_by_their_probability_are_routed_by_their_prompts(newest):
    check_routed_as_alone(newest("dft"))
    assert not warned_of_prompt(newest("dft"))


# --- what is said where that cannot be known


def test_training_on_whole_messages_is_warned_of_once(runs):
    check_warned_once(runs("messages"))
    assert "completion_only_loss" in warned_of_prompt(runs("messages"))[0]


@pytest.mark.parametrize("name", ["label smoothing", "compute_loss_func"])
def test_labels_that_the_trainer_takes_away_are_warned_of_once(runs, name):
    check_warned_once(runs(name))


@pytest.mark.parametrize("name", ["messages, packed", "messages, padding-free"])
def test_first_token_of_a_packed_sample_is_no_prompt(runs, name):
    """TRL masks the label of the token that each sample begins with; no token before it predicts it."""
    check_warned_once(runs(name))


def test_row_that_begins_inside_an_answer_is_warned_of(runs):
    check_warned_once(runs("wrapped"))


@pytest.mark.parametrize("name", ["dft", "dpo", "dpo, padding-free"])
def test_trainer_that_keeps_labels_from_the_model_is_warned_of_once(older, name):
    check_warned_once(older(name))


def test_run_without_a_prompt_stops_where_that_is_asked_for(runs):
    assert runs("messages, error").error.startswith("MixLoraError")
    assert "completion_only_loss" in runs("messages, error").error


def test_preference_pairs_stop_where_that_is_asked_for_and_labels_are_missing(newest, older):
    assert newest("dpo, error").error is None
    assert older("dpo, error").error.startswith("MixLoraError")


def test_routes_by_the_whole_sequence_need_no_prompt(runs):
    assert runs("messages, sequence").error is None
    assert not warned_of_prompt(runs("messages, sequence"))


# --- the balance term


@pytest.mark.parametrize("plain", ["prompt-completion", "accumulated"])
def test_balance_term_counts_as_in_the_models_own_loss_or_is_told_not_to(runs, plain):
    without, run = runs(plain), runs("balanced" if plain == "prompt-completion" else f"balanced, {plain}")
    check_close(without.gradient, without.of_the_models_loss)
    if told_of_balance(run):
        return
    assert run.error is None
    check_close(run.gradient, run.of_the_models_loss)
    assert differ(run.gradient, without.gradient)


@pytest.mark.parametrize("name", ["dft", "label smoothing", "dpo"])
def test_balance_term_that_a_loss_of_the_trainers_leaves_out_is_told(runs, name):
    balanced = runs(f"balanced, {name}")
    if told_of_balance(balanced):
        return
    assert balanced.error is None
    assert differ(balanced.gradient, runs(name).gradient)


# --- the reference of DPO
