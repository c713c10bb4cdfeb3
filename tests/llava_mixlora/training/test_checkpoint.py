"""Checkpoints that are whole or absent."""

import shutil
import subprocess

import pytest

from llava_mixlora import MixLoraConfig, MixLoraError
from llava_mixlora.training import checkpoint


def write(output, name, content=b"weights"):
    folder = checkpoint.unfinished(output) / name
    (folder / "global_step").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(content)
    (folder / "global_step" / "rank 0.pt").write_bytes(content[::-1])
    return folder


@pytest.fixture
def output(tmp_path):
    """A folder with the whole checkpoints 2 and 10."""
    for name in ("checkpoint-2", "checkpoint-10"):
        write(tmp_path, name)
        checkpoint.publish(tmp_path, name)
    return tmp_path


def message(call, *arguments):
    with pytest.raises(MixLoraError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_checkpoints_come_newest_first_and_nothing_else_is_one(output):
    (output / "checkpoint-tmp").mkdir()
    (output / "checkpoint-7.bak").mkdir()
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-10", "checkpoint-2"]
    assert checkpoint.checkpoints(output / "missing") == []


def test_published_checkpoint_is_whole_and_nothing_is_left_beside_it(output):
    for folder in checkpoint.checkpoints(output):
        checkpoint.verify(folder)
    assert not checkpoint.unfinished(output).exists()


def test_sums_are_those_of_sha256sum(output):
    command = ["sha256sum", "--check", checkpoint.CHECKSUMS]
    said = subprocess.run(command, cwd=output / "checkpoint-2", capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count(": OK") == 2


def test_published_checkpoint_replaces_one_of_its_name(output):
    write(output, "checkpoint-2", b"other weights")
    folder = checkpoint.publish(output, "checkpoint-2")
    assert (folder / "optimizer.pt").read_bytes() == b"other weights"
    checkpoint.verify(folder)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["optimizer.pt", "global_step/rank 0.pt"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(output, capsys, harm, name):
    file = output / "checkpoint-10" / name
    content = file.read_bytes()
    {
        "flip": lambda: file.write_bytes(bytes([content[0] ^ 1]) + content[1:]),
        "cut": lambda: file.write_bytes(content[:-1]),
        "remove": file.unlink,
    }[harm]()
    assert str(file) in message(checkpoint.verify, output / "checkpoint-10")
    assert checkpoint.newest_whole(output).name == "checkpoint-2"
    assert str(file) in capsys.readouterr().out


def test_no_whole_checkpoint_is_an_error_that_names_the_damaged(output):
    for folder in checkpoint.checkpoints(output):
        (folder / "optimizer.pt").unlink()
    said = message(checkpoint.newest_whole, output)
    assert "checkpoint-10, checkpoint-2" in said and "--output_dir" in said


def test_checkpoint_that_lacks_the_projector_is_not_whole(output):
    shutil.rmtree(output / "checkpoint-10")
    (output / "checkpoint-2" / checkpoint.CHECKSUMS).unlink()
    (output / "checkpoint-2" / "adapter_model.safetensors").touch()
    assert "non_lora_trainables.bin is missing" in message(checkpoint.verify, output / "checkpoint-2")


def test_failed_write_is_named_and_leaves_nothing_unfinished(output):
    folder = write(output, "checkpoint-12")
    said = message(fail_while_saving, output / "checkpoint-12", OSError(5, "Input/output error"))
    assert "checkpoint-12" in said and "Input/output error" in said
    assert not folder.exists()


def test_other_errors_stay_what_they_are(output):
    with pytest.raises(ZeroDivisionError):
        fail_while_saving(output / "checkpoint-12", ZeroDivisionError())


def fail_while_saving(folder, error):
    with checkpoint.saving(folder):
        raise error


@pytest.mark.parametrize(("keep", "left"), [(1, ["checkpoint-10"]), (None, ["checkpoint-10", "checkpoint-2"])])
def test_oldest_checkpoints_are_removed(output, keep, left):
    checkpoint.remove_oldest(output, keep)
    assert [folder.name for folder in checkpoint.checkpoints(output)] == left


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 2, [10, 2]), (2, 2, [10, 2]), (3, 2, [10, 7, 2]), (2, 10, [10, 7]), (1, 10, [10]), (None, 2, [10, 7, 4, 2])],
)
def test_best_checkpoint_is_never_removed_and_the_newest_stays_too(output, keep, best, left):
    for number in (4, 7):
        (output / f"checkpoint-{number}").mkdir()
    checkpoint.remove_oldest(output, keep, output / f"checkpoint-{best}")
    assert [folder.name for folder in checkpoint.checkpoints(output)] == [f"checkpoint-{number}" for number in left]


@pytest.mark.parametrize(
    "other", [{"num_factors": 8}, {"r": 3}, {"routing": "random"}, {"rank_pattern": {"q_proj": 1}}]
)
def test_checkpoint_of_other_shapes_is_refused(output, other):
    MixLoraConfig(**{"r": 2, "num_factors": 4, **other}).save_pretrained(output / "checkpoint-2")
    said = message(checkpoint.check_same_adapter, output, MixLoraConfig(r=2, num_factors=4))
    assert "checkpoint-2" in said and next(iter(other)) in said and "--output_dir" in said


def test_checkpoint_of_the_same_shapes_passes_and_one_of_another_method_does_not(output):
    wanted = MixLoraConfig(r=2, num_factors=4, lora_alpha=1)
    MixLoraConfig(r=2, num_factors=4).save_pretrained(output / "checkpoint-2")
    checkpoint.check_same_adapter(output, wanted)
    (output / "checkpoint-10" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "checkpoint-10" in message(checkpoint.check_same_adapter, output, wanted)
