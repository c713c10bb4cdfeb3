"""Which runs go on from a checkpoint, and which are refused."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from llava_mixlora import MixLoraConfig
from llava_mixlora.training import checkpoint
from llava_mixlora.training.resuming import (
    Run,
    check_resuming,
    check_usable,
    describe_run,
    finished,
    is_written,
    read_run,
    write_run,
)

from ...tiny import message_of, write_adapter

SAMPLES = [
    {"id": number, "image": f"{number}.png", "conversations": [{"from": "human", "value": f"What is {number}?"}]}
    for number in range(8)
]
FLAGS = ["--output_dir=out", "--data_path=train.json", "--max_steps=5", "--learning_rate=0.01", "--use_cpu=True"]
ADAPTER = {"r": 2, "num_factors": 4, "lora_alpha": 16}


@pytest.fixture
def describe(patched):
    """The run that flags, beside the usual ones, describe."""
    from llava.train import train

    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))

    def describe(*flags, samples=SAMPLES, processes=1):
        return describe_run(vars(parser.parse_args([*FLAGS, *flags])), samples, processes)

    return describe


@pytest.fixture
def output(tmp_path, describe):
    """A folder with checkpoint-3 of a MixLoRA run of five steps."""
    leave(tmp_path, describe())
    return tmp_path


def leave(output, run, step=3, max_steps=5):
    folder = checkpoint.unfinished(output) / f"checkpoint-{step}"
    MixLoraConfig(**ADAPTER).save_pretrained(folder)
    for name in {*checkpoint.NEEDED, "optimizer.pt"} - {"adapter_config.json"}:
        (folder / name).write_text("{}")
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps({"global_step": step, "max_steps": max_steps}))
    if run is not None:
        write_run(run, folder)
    return checkpoint.publish(output, folder.name)


def refused(output, now, **adapter):
    said = message_of(check_resuming, output, now, MixLoraConfig(**{**ADAPTER, **adapter}))
    assert str(output / "checkpoint-3") in said and "--output_dir" in said
    return said


def accepted(output, now, **adapter):
    return check_resuming(output, now, MixLoraConfig(**{**ADAPTER, **adapter}))


def test_run_is_read_as_it_was_written(output, describe):
    assert read_run(output / "checkpoint-3") == describe()
    checkpoint.verify(output / "checkpoint-3")
    assert "run.json" in (output / "checkpoint-3" / checkpoint.CHECKSUMS).read_text()


def test_same_flags_and_data_go_on_without_a_word(output, describe):
    assert accepted(output, describe()) == []
    assert accepted(output, describe(samples=iter(copy.deepcopy(SAMPLES)))) == []


@pytest.mark.parametrize(
    "flag, value",
    [
        ("learning_rate", "0.02"),
        ("weight_decay", "0.1"),
        ("adam_beta1", "0.8"),
        ("adam_epsilon", "1e-6"),
        ("max_grad_norm", "0.5"),
        ("optim", "sgd"),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", "2"),
        ("mm_projector_lr", "0.001"),
        ("mixlora_router_lr", "0.001"),
        ("seed", "1"),
        ("data_seed", "3"),
        ("bits", "4"),
        ("version", "plain"),
        ("model_max_length", "99"),
        ("group_by_modality_length", "True"),
        ("image_aspect_ratio", "pad"),
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_vision_select_layer", "-2"),
        ("freeze_mm_mlp_adapter", "True"),
        ("dataloader_drop_last", "True"),
        ("label_smoothing_factor", "0.1"),
    ],
)
def test_flag_that_decides_what_is_learnt_is_refused_with_both_values(output, describe, flag, value):
    said = refused(output, now := describe(f"--{flag}={value}"))
    assert f"--{flag} {describe().flags[flag]}" in said and f"now say --{flag} {now.flags[flag]}" in said


def test_all_that_differs_is_named(output, describe):
    said = refused(output, describe("--learning_rate=0.02", "--seed=1"))
    assert "--learning_rate 0.01, --seed 42" in said or "--seed 42, --learning_rate 0.01" in said


def test_flag_that_was_given_then_and_is_missing_now_is_refused(tmp_path, describe):
    leave(tmp_path, describe("--mixlora_router_lr=0.001"))
    assert "--mixlora_router_lr 0.001, but the flags now say --mixlora_router_lr None" in refused(tmp_path, describe())


@pytest.mark.parametrize(
    "flags",
    [
        ["--logging_steps=1", "--save_steps=7", "--save_total_limit=2", "--report_to=none"],
        ["--dataloader_num_workers=2", "--gradient_checkpointing=True", "--run_name=other"],
        ["--output_dir=elsewhere", "--image_folder=elsewhere", "--data_path=same.json", "--ddp_timeout=7"],
        ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=2"],
        ["--per_device_eval_batch_size=4", "--eval_steps=7"],
    ],
)
def test_flags_that_change_nothing_in_what_is_learnt_may_change(output, describe, flags):
    assert accepted(output, describe(*flags)) == []


def test_longer_training_is_allowed_and_its_schedule_told(output, describe):
    (note,) = accepted(output, describe("--max_steps=9"))
    assert "--max_steps 5, now --max_steps 9" in note and "learning rate" in note


@pytest.mark.parametrize(
    "flags, processes",
    [(["--per_device_train_batch_size=2"], 1), (["--gradient_accumulation_steps=2"], 1), ([], 2)],
)
def test_other_number_of_samples_in_a_step_is_refused(output, describe, flags, processes):
    said = refused(output, describe(*flags, processes=processes))
    assert "8 × 1 (accumulation) × 1 (processes) = 8" in said


def test_same_samples_in_a_step_by_other_processes_is_told_and_refused_for_deepspeed(tmp_path, output, describe):
    (note,) = accepted(output, describe("--per_device_train_batch_size=4", processes=2))
    assert "by 1 processes, now 2" in note
    of_zero = describe()
    of_zero = replace(of_zero, flags={**of_zero.flags, "deepspeed": "zero2.json"})
    leave(tmp_path / "zero", of_zero)
    halves = {**of_zero.flags, "per_device_train_batch_size": 4}
    said = message_of(
        check_resuming, tmp_path / "zero", replace(of_zero, flags=halves, processes=2), MixLoraConfig(**ADAPTER)
    )
    assert "with 1 processes" in said and "with 2 processes" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda samples: samples[:-1],
        lambda samples: [*samples[1:], samples[0]],
        lambda samples: [{**samples[0], "id": "other"}, *samples[1:]],
        lambda samples: [{**samples[0], "image": "other.png"}, *samples[1:]],
        lambda samples: [{**samples[0], "conversations": [{"from": "human", "value": "Why?"}]}, *samples[1:]],
    ],
    ids=["fewer", "order", "id", "image", "text"],
)
def test_other_data_is_refused_and_continuing_on_it_named(output, describe, change):
    said = refused(output, describe(samples=change(SAMPLES)))
    assert "--mixlora_init_from" in said


def test_further_fields_of_samples_do_not_count(output, describe):
    assert accepted(output, describe(samples=[{**sample, "source": "x"} for sample in SAMPLES])) == []


@pytest.mark.parametrize(
    "other",
    [
        {"num_factors": 8},
        {"r": 3},
        {"routing": "random"},
        {"rank_pattern": {"q_proj": 1}},
        {"lora_alpha": 8},
        {"lora_dropout": 0.1},
        {"router_scope": "sequence"},
        {"router_gradient": "none"},
        {"bias": "all"},
        {"balance_loss_weight": 0.1},
    ],
)
def test_other_adapter_is_refused_with_its_field(output, describe, other):
    said = refused(output, describe(), **other)
    assert f"{next(iter(other))}=" in said and "the flags say" in said


def test_preset_is_told_by_what_it_comes_to(output, describe):
    said = message_of(
        check_resuming, output, describe("--mixlora_preset=paper"), MixLoraConfig.paper(r=2, num_factors=4)
    )
    assert "count_padding=False" in said and "count_padding=True" in said


def test_adapter_of_another_kind_is_refused_both_ways(output, describe):
    assert "holds a MixLoRA adapter" in message_of(check_resuming, output, describe(), None)
    (output / "checkpoint-3" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "no MixLoRA adapter" in refused(output, describe())


def test_base_that_lies_elsewhere_now_goes_on_and_another_one_does_not(tmp_path, describe):
    def model(name, value):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_file({"up_proj.weight": torch.full((8, 8), value)}, folder / "model.safetensors")
        return f"--model_name_or_path={folder}"

    leave(tmp_path / "out", describe(model("a", 1.0)))
    assert check_resuming(tmp_path / "out", describe(model("b", 1.0)), MixLoraConfig(**ADAPTER)) == []
    said = message_of(check_resuming, tmp_path / "out", describe(model("c", 2.0)), MixLoraConfig(**ADAPTER))
    assert "--model_name_or_path" in said and str(tmp_path / "c") in said


def test_checkpoint_that_does_not_tell_its_run_goes_on_with_a_note(tmp_path, describe):
    leave(tmp_path, None)
    (note,) = accepted(tmp_path, describe("--learning_rate=0.5"))
    assert "does not tell its data and flags" in note and "\n" not in note
    assert accepted(tmp_path / "empty", describe()) == []


def test_damaged_record_is_left_to_the_checksums(output, describe):
    (output / "checkpoint-3" / "run.json").write_text('{"flags": 3}')
    assert "flags is no dict" in message_of(read_run, output / "checkpoint-3")
    accepted(output, describe())
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.newest_whole(output)


def test_run_is_finished_at_its_last_step_and_not_before(tmp_path, describe):
    leave(tmp_path, describe())
    assert finished(tmp_path, describe()) is None
    last = leave(tmp_path, describe(), step=5)
    assert finished(tmp_path, describe()) == last
    assert finished(tmp_path, describe("--max_steps=6")) is None
    assert finished(tmp_path, describe("--max_steps=4")) == last
    (last / "optimizer.pt").write_text("damaged")
    assert finished(tmp_path, describe()) is None


@pytest.mark.parametrize("epochs, expected", [("3", True), ("2", True), ("4", False)])
def test_last_step_follows_from_the_epochs_too(tmp_path, describe, epochs, expected):
    leave(tmp_path, describe("--max_steps=-1", "--num_train_epochs=3"), step=6, max_steps=6)
    now = describe("--max_steps=-1", f"--num_train_epochs={epochs}")
    assert (finished(tmp_path, now) is not None) is expected


def test_result_is_written_once_its_last_file_is(tmp_path, describe):
    last = leave(tmp_path, describe(), step=5)
    names = ["trainer_state.json", "adapter_config.json", "config.json"]
    names += ["adapter_model.safetensors", "non_lora_trainables.bin"]
    for name in names:
        assert not is_written(tmp_path, last)
        (tmp_path / name).write_bytes((last / name).read_bytes())
    assert is_written(tmp_path, last)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')  # of a run that went on and was killed then
    assert not is_written(tmp_path, last)


def test_samples_in_a_step_are_those_of_all_processes():
    run = Run({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 1, "", 2, {})
    assert run.samples_per_step == 24


@pytest.fixture
def whole(llava_folder, tmp_path):
    """A checkpoint with a real adapter, as LLaVA alone leaves it, without checksums."""
    folder = write_adapter(llava_folder, tmp_path / "checkpoint-3")
    (folder / checkpoint.TRAINER_STATE).write_text("{}")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    (folder / "global_step3").mkdir()
    torch.save({"module": {"a": torch.ones(2)}}, folder / "global_step3" / "mp_rank_00_model_states.pt")
    return folder


def test_whole_checkpoint_is_usable(whole):
    check_usable(whole)


@pytest.mark.parametrize("state", [{"x": 1}, {"global_step": "3"}, {"log_history": 3}, {"max_steps": None}], ids=str)
def test_state_that_no_trainer_could_load_is_not_gone_on_from(whole, state):
    (whole / checkpoint.TRAINER_STATE).write_text(json.dumps(state))
    assert next(iter(state)) in message_of(check_usable, whole)


class Code:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "global_step3/mp_rank_00_model_states.pt", "scaler.pt"]
)
def test_state_with_code_is_not_gone_on_from(whole, name):
    torch.save({"state": Code()}, whole / name)
    assert f"{whole / name} holds code ('posix.system'), which was not executed" in message_of(check_usable, whole)


def test_adapter_of_a_checkpoint_goes_through_the_door(whole):
    weights = load_file(whole / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("mixlora_B"))
    weights[name][0] = float("nan")
    save_file(weights, whole / "adapter_model.safetensors")
    assert "are not finite" in message_of(check_usable, whole)
