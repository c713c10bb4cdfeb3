"""Statistics of two real processes, of any loop: those of one process that saw all the data. LLaVA's own are in

tests/end_to_end/test_many_processes.py.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llava_mixlora.method.word_centre import word_sums

from . import two_processes
from .two_processes import BATCH, STEPS, WORDS, adapted, base, statistics, steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two have worked."""
    place = tmp_path_factory.mktemp("two")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    told = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    told |= {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", two_processes.__name__, str(place)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": Path(__file__).parents[3]}
    processes = [
        subprocess.Popen(words, env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in (0, 1)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return place


@pytest.fixture(scope="module")
def seen(folder):
    """What each of the two found, by case."""
    return [torch.load(folder / f"seen-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """Of one process that saw all the data: after the first half of the steps, and after all."""
    model = steps(adapted())
    half = statistics(model)
    return half, statistics(steps(model, first=STEPS))


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=0)
    # Sums of squares: entries near zero are differences of large numbers.
    torch.testing.assert_close(found[1], expected[1], atol=1e-5 * float(expected[1].abs().max()), rtol=0)


def test_data_parallelism_leaves_to_each_process_what_it_counts(seen, alone):
    own = [rank["ddp"]["own"] for rank in seen]
    assert not torch.equal(own[0][0], own[1][0])
    assert_same([sum(parts) for parts in zip(*own)], alone[0])


def test_shared_statistics_are_those_of_one_process_however_often_they_are_shared(seen, alone):
    for rank in seen:
        assert_same(rank["ddp"]["shared"], alone[0])
        assert_same(rank["ddp"]["shared twice"], rank["ddp"]["shared"])


def test_words_are_centred_by_what_all_processes_have_seen(seen):
    model = steps(adapted(**WORDS))
    expected = word_sums(model.get_base_model(), "default")
    assert expected[-1] == STEPS * BATCH
    for rank in seen:
        for sums in rank["words"].values():
            torch.testing.assert_close(sums, expected)


def test_saving_what_one_process_counted_says_once_what_to_call(seen):
    for rank in seen:
        (warning,) = rank["ddp"]["warned before"]
        assert "statistics of one of 2 processes" in warning and "llava_mixlora.share_statistics(model)" in warning
        assert rank["ddp"]["warned after"] == []


@pytest.mark.parametrize("how", ["adapter", "state dict"])
def test_what_was_loaded_is_not_added_again(seen, alone, how):
    for rank in seen:
        assert_same(rank["resumed"][how], alone[1])


def test_wrapper_that_overwrites_counts_is_told_of(seen):
    for rank in seen:
        (warning,) = rank["broadcasting"]
        assert warning.endswith("make it with broadcast_buffers=False")


def test_model_without_layers_is_refused(seen):
    assert "LlamaForCausalLM has no MixLoRA layers" in seen[0]["no layers"]


@pytest.mark.parametrize("how", ["fsdp2", "fsdp1"])
def test_sharded_training_counts_and_saves_what_one_process_does(seen, alone, folder, how):
    for rank in seen:
        assert_same(rank[how]["counts"], alone[0])
        assert rank[how]["warned"] == []
    loaded = PeftModel.from_pretrained(base(), folder / how)
    assert_same(statistics(loaded), alone[0])
    for name, parameter in steps(adapted()).named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, atol=1e-5, rtol=1e-4, check_device=False)


def test_trainer_with_the_callback_counts_and_saves_what_one_process_does(seen, folder, tmp_path):
    trainer, _ = two_processes.train_with_trainer(tmp_path, BATCH, save_steps=2, save_strategy="steps")
    for rank in seen:
        assert_same(rank["trainer"]["counts"], statistics(trainer.model))
        assert not any(rank["trainer"]["warned"])
    for written, expected in (
        ("trainer/checkpoint-2", tmp_path / "checkpoint-2"),
        ("trainer-0", tmp_path / f"checkpoint-{STEPS}"),
    ):
        counts, of_one = (
            load_file(Path(place) / "adapter_model.safetensors") for place in (folder / written, expected)
        )
        assert all(torch.equal(counts[name], of_one[name]) for name in of_one if "stats_usage" in name)


def test_reporter_before_the_callback_gets_the_figures_of_all_processes(seen, tmp_path):
    _, alone = two_processes.train_with_trainer(tmp_path, BATCH, save_strategy="no")
    logs = [entry for entry in seen[0]["trainer"]["logs"] if "loss" in entry]
    assert len(logs) == STEPS
    for entry, expected in zip(logs, alone):
        for name in ("mixlora_dead_share_A", "mixlora_usage_balance_B"):
            assert entry[name] == pytest.approx(expected[name])
