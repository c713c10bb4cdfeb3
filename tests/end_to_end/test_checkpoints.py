"""Training that is killed, told to end, or runs out of disk, and then goes on: in real processes."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from llava_mixlora.training import checkpoint

from ..tiny import deepspeed_on_cpu
from .training import ALONE, RUN, SCRIPTS, environment, program, train

STEPS = 7  # of two examples each: the second epoch is left before its end
COMMON = [
    f"--max_steps={STEPS}",
    "--optim=adamw_torch",
    "--learning_rate=0.01",
    "--lora_dropout=0.3",
    "--group_by_modality_length=True",
    "--save_strategy=steps",
    "--save_steps=1",
]
MIXLORA = ["--mixlora_enable=True", "--mixlora_num_factors=4"]
LORA = ["--lora_enable=True"]
ONE = ["--per_device_train_batch_size=2"]
ZERO2 = ["--per_device_train_batch_size=1", "--deepspeed", str(SCRIPTS / "zero2.json")]
DEEPSPEED = [program("deepspeed"), "--num_gpus=2", "--master_port=29631", "--module", "llava_mixlora", *RUN]


class Case:
    """One way to train, and the folder that an uninterrupted run of it has left."""

    def __init__(self, launcher, inputs, place, *flags):
        self.launcher, self.inputs, self.flags = launcher, inputs, [*COMMON, *flags]
        self.uninterrupted = place / "uninterrupted-lora"
        self.finish(self.uninterrupted)

    def start(self, output):
        words = [*self.launcher, *self.inputs, "--output_dir", str(output), *self.flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, env=environment(), start_new_session=True, **pipes)

    def finish(self, output):
        train(self.launcher, self.inputs, output, *self.flags)

    def kill(self, output, moment, after):
        """Start, and kill -9 all of it in a step or in a save, once there is a checkpoint of step `after`."""
        process = self.start(output)
        wait_for(lambda: newest(output) >= after, process)
        if moment == "save":
            wait_for(checkpoint.unfinished(output).exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def mixlora(inputs, tmp_path_factory):
    return Case(ALONE, inputs, tmp_path_factory.mktemp("mixlora"), *MIXLORA, *ONE)


def newest(output):
    return max((int(folder.name.split("-")[1]) for folder in checkpoint.checkpoints(output)), default=0)


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)
    raise AssertionError("it never came to that")


def trained(folder):
    """Adapter, statistics and projector."""
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **beside}


def assert_same(output, expected):
    found, wanted = trained(output), trained(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6, msg=name)


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_killed_run_goes_on_as_if_nothing_had_happened(mixlora, tmp_path):
    output = tmp_path / "llava-lora"
    mixlora.kill(output, "step", after=2)
    mixlora.kill(output, "save", after=5)  # in the middle of the second epoch
    mixlora.finish(output)
    assert_same(output, mixlora.uninterrupted)
    assert not checkpoint.unfinished(output).exists()


@pytest.mark.parametrize(
    ("launcher", "flags", "moment"),
    [
        pytest.param(ALONE, [*LORA, *ONE], "step", id="plain LoRA"),
        pytest.param(DEEPSPEED, [*MIXLORA, *ZERO2], "save", id="ZeRO-2", marks=deepspeed_on_cpu),
    ],
)
def test_killed_run_of_another_kind_goes_on_too(inputs, tmp_path, launcher, flags, moment):
    case, output = Case(launcher, inputs, tmp_path, *flags), tmp_path / "llava-lora"
    case.kill(output, moment, after=5)
    case.finish(output)
    assert_same(output, case.uninterrupted)


def test_terminated_run_saves_and_a_damaged_checkpoint_is_skipped(mixlora, tmp_path):
    output = tmp_path / "llava-lora"
    process = mixlora.start(output)
    wait_for(lambda: newest(output) >= 2, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"SIGTERM: saved step {newest(output)} in {output}" in said
    assert "Traceback" not in said

    last = checkpoint.checkpoints(output)[0]
    damage(last / "optimizer.pt")
    process = mixlora.start(output)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"{last / 'optimizer.pt'} is damaged: its checksum is not the one in checksums.sha256: skipping" in said
    assert f"going on from {last.with_name(f'checkpoint-{int(last.name[11:]) - 1}')}" in said
    assert_same(output, mixlora.uninterrupted)


def test_run_killed_after_its_last_step_makes_no_further_step(mixlora, tmp_path):
    output = tmp_path / "llava-lora"
    shutil.copytree(mixlora.uninterrupted, output)
    (output / "adapter_model.safetensors").unlink()
    mixlora.finish(output)
    assert_same(output, mixlora.uninterrupted)


def test_checkpoint_loads_as_the_final_output_does(mixlora, patched):
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.builder import load_pretrained_model

    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, *range(3, 12)]])
    images = torch.rand(1, 3, 16, 16)
    logits = []
    for folder in (mixlora.uninterrupted, mixlora.uninterrupted / f"checkpoint-{STEPS}"):
        _, model, _, _ = load_pretrained_model(str(folder), None, folder.name, device="cpu")
        logits.append(model.float()(input_ids=ids, images=images).logits)
    assert torch.equal(*logits)
    assert "## Load it" in (mixlora.uninterrupted / f"checkpoint-{STEPS}" / "README.md").read_text()


def test_checkpoint_of_plain_lora_loads_through_upstreams_branch(inputs, tmp_path, patched):
    from llava.model.builder import load_pretrained_model

    output = tmp_path / "llava-lora"
    train(ALONE, inputs, output, *COMMON, *LORA, *ONE, "--max_steps=1")
    base = inputs[0].split("=")[1]
    of_checkpoint, of_output = (
        load_pretrained_model(str(folder), base, "llava-lora", device="cpu")[1].state_dict()
        for folder in (output / "checkpoint-1", output)
    )
    assert all(torch.equal(of_output[name], of_checkpoint[name]) for name in of_output)


def test_full_disk_is_one_line_and_leaves_earlier_checkpoints_intact(mixlora, tmp_path):
    run = " ".join(f"'{word}'" for word in [*mixlora.launcher, *mixlora.inputs, *mixlora.flags])
    script = f"""
        mount -t tmpfs -o size=800k tmpfs {tmp_path} || exit 99
        {run} --output_dir {tmp_path}/llava-lora
        echo "status $?"
        cd {tmp_path}/llava-lora && ls -A
        for folder in checkpoint-*; do (cd $folder && sha256sum --check --quiet checksums.sha256 && echo whole); done
    """
    words = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system of his own")
    said = done.stdout.split("status ")[1].split()
    assert said[0] == "1", done.stderr
    assert "checkpoint-1" in said and said.count("whole") == sum("checkpoint" in word for word in said)
    assert ".unfinished" not in said
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "could not be written (the disk is full)" in errors[0]
    assert "Traceback" not in done.stderr
