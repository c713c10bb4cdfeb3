"""SIGTERM while a model trains."""

import os
import signal

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import TrainerControl, TrainerState, TrainingArguments

from llava_mixlora.training import termination
from llava_mixlora.training.termination import SaveOnTermination, interruptible


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    """Python's own handling, whatever a failed training in this process, or a shell's background job, has left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def running(tmp_path):
    """A callback that listens, and its arguments."""
    callback = SaveOnTermination()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(is_world_process_zero=True)
    callback.on_train_begin(*arguments, TrainerControl())
    yield callback, arguments
    callback.on_train_end(*arguments, TrainerControl())


def test_step_ends_without_a_save_when_nothing_came(running):
    callback, arguments = running
    control = TrainerControl()
    callback.on_step_end(*arguments, control)
    callback.on_save(*arguments, control)
    assert not control.should_save


def test_signal_saves_at_the_end_of_the_step_and_then_ends_the_program(running, capsys):
    callback, arguments = running
    os.kill(os.getpid(), signal.SIGTERM)
    control = TrainerControl()
    callback.on_step_end(*arguments, control)
    assert control.should_save
    with pytest.raises(SystemExit) as ended:
        callback.on_save(*arguments, control)
    assert ended.value.code == 143
    assert arguments[0].output_dir in capsys.readouterr().out


def test_save_in_progress_is_finished_before_the_one_that_ends_the_program(running):
    callback, arguments = running
    callback.on_step_end(*arguments, TrainerControl())
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_save(*arguments, TrainerControl())  # of the step that the signal came after


def test_signal_has_its_usual_effect_after_training(tmp_path):
    usual = signal.getsignal(signal.SIGTERM)
    callback = SaveOnTermination()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(*arguments)
    assert signal.getsignal(signal.SIGTERM) != usual
    callback.on_train_end(*arguments)
    assert signal.getsignal(signal.SIGTERM) == usual


@pytest.mark.slow
def test_one_process_with_the_signal_is_enough(tmp_path):
    multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)


def _one_of_two(rank, place):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    callback, control = SaveOnTermination(), TrainerControl()
    arguments = TrainingArguments(place, use_cpu=True), TrainerState()
    callback.on_train_begin(*arguments, control)
    callback.on_step_end(*arguments, control)
    assert not control.should_save
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    callback.on_step_end(*arguments, control)
    assert control.should_save
    distributed.destroy_process_group()


def test_ctrl_c_saves_at_the_end_of_the_step_and_says_what_is_kept(running, capfd):
    callback, arguments = running
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher too
    assert "Ctrl-C again ends at once" in capfd.readouterr().out
    control = TrainerControl()
    callback.on_step_end(*arguments, control)
    assert control.should_save
    with pytest.raises(KeyboardInterrupt, match="saved step 0 in .*; the same command goes on from it"):
        callback.on_save(*arguments, control)


def test_second_ctrl_c_ends_at_once(running, monkeypatch):
    monkeypatch.setattr(termination, "ONE_PRESS", 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_train_tells_the_newest_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing was saved yet"), interruptible(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(KeyboardInterrupt, match="checkpoint-7 is kept; the same command"), interruptible(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_a_result_that_is_being_written(tmp_path):
    written, usual = tmp_path / "result", signal.getsignal(signal.SIGINT)
    callback, arguments = SaveOnTermination(), (TrainingArguments(str(tmp_path), use_cpu=True), TrainerState())
    said = "training had ended, and .* holds its result"
    with pytest.raises(KeyboardInterrupt, match=said), interruptible(str(tmp_path)):
        callback.on_train_begin(*arguments, TrainerControl())
        callback.on_train_end(*arguments, TrainerControl())
        os.kill(os.getpid(), signal.SIGINT)
        written.touch()
    assert written.exists() and signal.getsignal(signal.SIGINT) is usual


def test_ignored_ctrl_c_stays_ignored(tmp_path):
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        callback = SaveOnTermination()
        arguments = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
        callback.on_train_begin(*arguments)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        callback.on_train_end(*arguments)
    finally:
        signal.signal(signal.SIGINT, usual)
