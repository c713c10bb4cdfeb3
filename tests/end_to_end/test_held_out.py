"""Held-out data during training, in real processes: the same training, the best checkpoint, an early end."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_mixlora.training import checkpoint

from ..tiny import draw_pictures
from .training import ALONE, RUN, program, train

STEPS = 6
FLAGS = [
    *(f"--max_steps={STEPS}", "--per_device_train_batch_size=2", "--per_device_eval_batch_size=2", "--logging_steps=1"),
    *("--optim=adamw_torch", "--learning_rate=0.05", "--lora_dropout=0.3", "--save_strategy=steps", "--save_steps=2"),
]
MIXLORA = ["--mixlora_enable=True", "--mixlora_num_factors=4"]
LORA = ["--lora_enable=True"]
TASKS = ("color", "shape")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Flags of five held-out samples of two tasks, one of them with two turns; training teaches no answer of theirs."""
    place = tmp_path_factory.mktemp("held-out")
    draw_pictures(place, 5)
    samples = []
    for number in range(5):
        turns = [("human", "<image>\nwhat color is the circle?"), ("gpt", "a blue circle")]
        turns += [("human", "is it a square?"), ("gpt", "green")] if number == 4 else []
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        samples.append({"image": f"{number}.png", "task": TASKS[number % 2], "conversations": conversation})
    (place / "held_out.json").write_text(json.dumps(samples))
    return [f"--eval_data_path={place / 'held_out.json'}", f"--eval_image_folder={place}"]


def history(output, name):
    """Step and value of each entry of a run's log."""
    logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[name]) for entry in logged if name in entry]


def trained(folder):
    """Adapter, statistics and projector."""
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **beside}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", [MIXLORA, LORA], ids=["MixLoRA", "plain LoRA"])
def test_training_is_the_same_with_held_out_data_and_without(inputs, held_out, tmp_path, kind):
    without, beside = tmp_path / "without-lora", tmp_path / "beside-lora"
    train(ALONE, inputs, without, *FLAGS, *kind)
    train(ALONE, inputs, beside, *FLAGS, *kind, *held_out, "--eval_steps=1")
    assert history(beside, "loss") == history(without, "loss") and len(history(beside, "loss")) == STEPS
    assert_equal(trained(beside), trained(without))
    for name in ("eval_loss", "eval_exact_match", *(f"eval_exact_match_{task}" for task in TASKS)):
        assert [step for step, _ in history(beside, name)] == list(range(1, STEPS + 1)), name


@pytest.fixture(scope="module")
def stopped(inputs, held_out, tmp_path_factory):
    """A run that learns what the held-out data contradict, and is told to stop when that shows; and how to start it."""
    output = tmp_path_factory.mktemp("stopped") / "llava-lora"
    flags = [*FLAGS, *MIXLORA, *held_out, "--max_steps=30", "--learning_rate=0.3", "--eval_steps=1", "--save_steps=1"]
    flags += ["--load_best_model_at_end=True", "--early_stopping_patience=3", "--save_total_limit=1"]
    train(ALONE, inputs, output, *flags)
    return output, lambda: train(ALONE, inputs, output, *flags)


def test_run_stops_early_and_its_output_is_the_best_checkpoint(stopped):
    output, _ = stopped
    losses = history(output, "eval_loss")
    best = min(losses, key=lambda entry: entry[1])[0]
    assert len(losses) == best + 3 < 30
    kept = checkpoint.checkpoints(output)
    assert [folder.name for folder in kept] == [f"checkpoint-{best + 3}", f"checkpoint-{best}"]
    for folder in kept:
        checkpoint.verify(folder)
    assert_equal(trained(output), trained(kept[1]))
    last = trained(kept[0])
    assert sum(not torch.equal(last[name], each) for name, each in trained(output).items()) > len(last) // 2
    recorded = json.loads((kept[0] / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert recorded == str(kept[1])


def test_run_that_has_stopped_early_makes_no_further_step(stopped):
    output, start = stopped
    before, losses = trained(output), history(output, "eval_loss")
    (output / "adapter_model.safetensors").unlink()
    start()
    assert history(output, "eval_loss") == losses
    assert_equal(trained(output), before)


def test_two_processes_count_each_held_out_sample_once(inputs, held_out, tmp_path):
    flags = [*FLAGS, *MIXLORA, *held_out, "--max_steps=1", "--learning_rate=0", "--per_device_eval_batch_size=1"]
    flags += ["--per_device_train_batch_size=1", "--save_strategy=no"]
    both = [program("torchrun"), "--nproc_per_node=2", "--master_port=29633", "-m", "llava_mixlora", *RUN]
    found = []
    for launcher, output in ((ALONE, tmp_path / "one-lora"), (both, tmp_path / "two-lora")):
        train(launcher, inputs, output, *flags)
        names = ("eval_loss", "eval_exact_match", *(f"eval_exact_match_{task}" for task in TASKS))
        found.append([history(output, name)[0][1] for name in names])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
