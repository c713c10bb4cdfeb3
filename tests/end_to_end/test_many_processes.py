"""Training in several processes equals training in one: torchrun, DeepSpeed's ZeRO stages, two nodes, resuming."""

import functools
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import training
from .training import SCRIPTS, environment, program, write_inputs

RUN = ["llava_mixlora", *training.RUN]
WORDS = ["red", "green", "blue", "circle", "square", "red", "green", "blue"]
STEPS, BATCH = 4, 8
# Rates at which rounding turns no route that the loss shows, on processors with bfloat16 instructions and without.
PRECISIONS = {
    "float32": ["--bf16=False"],
    "bfloat16": ["--bf16=True", "--learning_rate=0.02"],
    "4-bit": ["--bf16=True", "--learning_rate=0.01", "--bits=4"],
}
LAUNCHES = ["torchrun", "zero2", "zero3", "zero3_offload"]
# Gradients in bfloat16 depend by about 0.4% on how a batch is cut, in one process as in two, and that can turn a route:
# one process then takes the micro-batches of the two.
MICRO_BATCHES_OF_ONE = {"float32": 1, "bfloat16": 4, "4-bit": 4}
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3, "4-bit": 1e-3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, _llava, clip_folder, tokenizer_folder):
    """A random LLaVA and sixteen pictures to describe, as flags of llava.train.train.

    Logits are small, for bfloat16 to tell losses apart by less than 1e-3; answers have equally many tokens, because the
    loss is a mean over tokens; and Adam's epsilon is large, because it would make full steps of what is rounding noise
    in a gradient.
    """
    config = type(_llava.config)(**{**_llava.config.to_dict(), "initializer_range": 0.05})
    torch.manual_seed(4)
    llava = type(_llava)(config)
    starts = [number % len(WORDS) for number in range(2 * BATCH)]
    answers = [" ".join(WORDS[start:] + WORDS[:start]) for start in starts]
    flags = {
        "mixlora_enable": True,
        "mixlora_num_factors": 16,  # large enough for ZeRO-3 to partition the factors
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS // 2,
    }
    common = write_inputs(tmp_path_factory.mktemp("inputs"), llava, clip_folder, tokenizer_folder, answers)
    return [*common, *(f"--{name}={value}" for name, value in flags.items())]


def start(words):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment(), **pipes)


def train(launcher, inputs, output, *flags):
    process = start([*launcher, *RUN, *inputs, "--output_dir", str(output), *flags])
    said, _ = process.communicate()
    assert process.returncode == 0, said[-5000:]
    return output


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_process(micro_batches):
    flags = [f"--per_device_train_batch_size={BATCH // micro_batches}"]
    return [sys.executable, "-m"], [*flags, f"--gradient_accumulation_steps={micro_batches}"]


def two_processes(how):
    """Launcher and flags for the same global batch, half of it in each process, in two turns."""
    flags = [f"--per_device_train_batch_size={BATCH // 4}", "--gradient_accumulation_steps=2"]
    if how == "torchrun":
        return [program("torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}", "-m"], flags
    launcher = [program("deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--module"]
    return launcher, [*flags, "--deepspeed", str(SCRIPTS / f"{how}.json")]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The output folder of a run, which takes place once."""

    @functools.cache
    def trained(how, precision):
        launcher, flags = one_process(MICRO_BATCHES_OF_ONE[precision]) if how == "alone" else two_processes(how)
        output = tmp_path_factory.mktemp("trained") / "llava-mixlora"
        return train(launcher, inputs, output, *flags, *PRECISIONS[precision])

    return trained


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64)


def assert_same_adapter(folder, expected_folder):
    adapter, expected = (load_file(place / "adapter_model.safetensors") for place in (folder, expected_folder))
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():  # whole numbers, the counts, have no tolerance
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if tensor.is_floating_point() else {"atol": 0, "rtol": 0}
        if "moments" in name:  # sums of squares: entries near zero are differences of large numbers
            tolerance = {"atol": 1e-5 * float(tensor.abs().max()), "rtol": 0}
        torch.testing.assert_close(adapter[name], tensor, **tolerance, msg=name)


def assert_same_projector(folder, expected_folder):
    projector, expected = (torch.load(place / "non_lora_trainables.bin") for place in (folder, expected_folder))
    assert projector.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(projector[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("how", "precision"),
    [*((how, precision) for how in LAUNCHES for precision in ("float32", "bfloat16")), ("zero2", "4-bit")],
)
def test_loss_curve_of_two_processes_is_that_of_one(trained, how, precision):
    curve, expected = losses(trained(how, precision)), losses(trained("alone", precision))
    assert len(expected) == STEPS and expected[0] - expected[-1] > 20 * LOSS_TOLERANCE[precision]
    torch.testing.assert_close(curve, expected, atol=LOSS_TOLERANCE[precision], rtol=0)


@pytest.mark.parametrize("how", LAUNCHES)
def test_what_two_processes_save_is_what_one_saves(trained, how):
    output, expected = trained(how, "float32"), trained("alone", "float32")
    assert_same_adapter(output, expected)
    assert_same_projector(output, expected)
    assert_same_adapter(output / f"checkpoint-{STEPS // 2}", expected / f"checkpoint-{STEPS // 2}")


@pytest.mark.parametrize("how", ["torchrun", "zero2", "zero3"])
def test_resumed_run_ends_like_one_that_was_not_interrupted(trained, inputs, tmp_path, how):
    half = f"checkpoint-{STEPS // 2}"
    shutil.copytree(trained(how, "float32") / half, tmp_path / half)
    launcher, flags = two_processes(how)
    resumed = train(launcher, inputs, tmp_path, *flags)
    assert_same_adapter(resumed, trained(how, "float32"))  # its statistics too: every instance is counted once
    assert_same_projector(resumed, trained(how, "float32"))


@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_adapter_loads_as_that_of_one_process_does(patched, trained, how):
    from llava.model.builder import load_pretrained_model

    def logits(output):
        _, model, _, _ = load_pretrained_model(str(output), None, "llava-mixlora", device="cpu", device_map="cpu")
        inputs = {"input_ids": torch.arange(3, 13).view(1, -1), "images": None}
        with torch.no_grad():
            adapted = model.float()(**inputs).logits
            with model.disable_adapter():
                return adapted, model(**inputs).logits

    adapted, base = logits(trained(how, "float32"))
    expected, _ = logits(trained("alone", "float32"))
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=0)


def test_two_nodes_train_what_one_process_trains(trained, inputs, tmp_path):
    """Each node saves, as upstream does it: their disks may not be shared."""
    port = free_port()
    _, flags = two_processes("torchrun")
    nodes = []
    for rank in (0, 1):
        launcher = [program("torchrun"), "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m"]
        nodes.append(start([*launcher, *RUN, *inputs, f"--output_dir={tmp_path / str(rank)}", *flags]))
    said = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for rank in (0, 1):
        assert_same_adapter(tmp_path / str(rank), trained("alone", "float32"))
        assert_same_projector(tmp_path / str(rank), trained("alone", "float32"))


def test_more_processes_than_conversations_are_refused_in_one_line(inputs, tmp_path):
    (data,) = [flag.split("=")[1] for flag in inputs if flag.startswith("--data_path")]
    (tmp_path / "one.json").write_text(json.dumps(json.loads(Path(data).read_text())[:1]))
    launcher, flags = two_processes("torchrun")
    words = [*launcher, *RUN, *inputs, *flags, f"--data_path={tmp_path / 'one.json'}", f"--output_dir={tmp_path / 'o'}"]
    process = start(words)
    said, _ = process.communicate()
    assert process.returncode != 0
    assert f"llava-mixlora: error: {tmp_path / 'one.json'}: expected at least one conversation for each" in said
    assert "llava/train/train.py" not in said and not (tmp_path / "o").exists()  # torchrun has a traceback of its own
