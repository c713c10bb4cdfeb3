"""A run that is interrupted and started again, with the flags of then and with others: in real processes."""

import json
import signal
import subprocess

import pytest
import torch

from llava_mixlora.folder_lock import NAME
from llava_mixlora.training import checkpoint

from .test_checkpoints import newest, wait_for
from .training import ALONE, environment

STEPS = 3000  # more than it will make until it is interrupted
FLAGS = [
    *("--mixlora_enable=True", "--mixlora_num_factors=4", "--per_device_train_batch_size=1"),
    *(
        "--optim=adamw_torch",
        "--learning_rate=0.001",
        "--save_strategy=steps",
        "--save_steps=1",
        "--save_total_limit=2",
    ),
]


class Run:
    """Runs into one output folder."""

    def __init__(self, inputs, output):
        self.inputs, self.output = inputs, output

    def start(self, *more, steps=STEPS):
        words = [*ALONE, *self.inputs, *FLAGS, f"--output_dir={self.output}", f"--max_steps={steps}", *more]
        return subprocess.Popen(
            words,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # off in a shell's background
        )

    def finish(self, *more, steps=STEPS):
        process = self.start(*more, steps=steps)
        said, errors = process.communicate()
        assert "Traceback" not in errors, errors[-3000:]
        return process.returncode, said, [line for line in errors.splitlines() if line.startswith("llava-mixlora:")]

    def files(self):
        """What lies in the folder, and when it was written."""
        return {file: file.stat().st_mtime_ns for file in self.output.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def interrupted(inputs, tmp_path_factory):
    """A run that a second one came to, and that Ctrl-C ended: its folder, and what both have said."""
    run = Run(inputs, tmp_path_factory.mktemp("resumed") / "llava-mixlora")
    first = run.start()
    wait_for(lambda: newest(run.output) >= 1, first)
    second = run.finish()
    assert first.poll() is None, "it ended too early to be met"
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate()
    return run, first, said, errors, second


def test_second_run_in_a_folder_is_refused(interrupted):
    run, first, _, _, (status, _, (line,)) = interrupted
    assert status == 1
    assert f"--output_dir {run.output} is in use by another run (process {first.pid} on " in line


def test_ctrl_c_saves_says_so_and_leaves_nothing_behind(interrupted):
    run, first, _, errors, _ = interrupted
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert first.returncode == 130 and "Traceback" not in errors
    assert line.endswith(
        f"interrupted: saved step {newest(run.output)} in {run.output}; the same command goes on from it"
    )
    assert sorted(file.name for file in run.output.iterdir() if "checkpoint-" not in file.name) == []
    checkpoint.verify(checkpoint.checkpoints(run.output)[0])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--learning_rate=0.002", "--seed=1"], ["--learning_rate 0.001", "--learning_rate 0.002", "--seed 1"]),
        (["--mixlora_preset=paper"], ["router_scope=instruction", "router_scope=sequence"]),
    ],
)
def test_other_flags_are_refused_before_the_model_is_loaded(interrupted, flags, named):
    run = interrupted[0]
    before = run.files()
    status, said, (line,) = run.finish(*flags)
    assert status == 1 and all(part in line for part in named) and "--output_dir" in line
    assert "Adding LoRA adapters" not in said
    assert run.files() == before


def test_same_flags_go_on_load_and_answer_and_a_finished_run_says_so(interrupted, patched):
    from llava.model.builder import load_pretrained_model

    run = interrupted[0]
    stopped, last = newest(run.output), newest(run.output) + 2
    status, said, errors = run.finish("--logging_steps=3", steps=last)
    assert (status, errors) == (0, []) and f"going on from {run.output / f'checkpoint-{stopped}'}" in said
    assert f"--max_steps {STEPS}, now --max_steps {last}" in said
    assert json.loads((run.output / "trainer_state.json").read_text())["global_step"] == last

    tokenizer, model, _, _ = load_pretrained_model(str(run.output), None, run.output.name, device="cpu")
    ids = torch.tensor([[1, -200, *tokenizer("what color", add_special_tokens=False).input_ids]])
    answer = model.float().generate(ids, images=torch.rand(1, 3, 16, 16), max_new_tokens=4, min_new_tokens=4)
    assert answer.shape[1] >= 4

    before = run.files()
    status, said, _ = run.finish("--logging_steps=3", steps=last)
    (line,) = [line for line in said.splitlines() if "already finished, nothing to train" in line]
    assert status == 0 and f"checkpoint-{last}" in line
    assert run.files() == before
    assert not (run.output / NAME).exists()
