"""A run that goes on from a trained adapter on new data, in real processes: trained, resumed, loaded, asked."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..tiny import deepspeed_on_cpu, draw_pictures, quantizes_on_cpu
from .training import ALONE, RUN, SCRIPTS, environment, program, train

FIRST = ["--mixlora_enable=True", "--mixlora_num_factors=4", "--lora_alpha=8", "--per_device_train_batch_size=4"]
# Learning is warmed up from a rate of 0: what the first step leaves is what the run has started from.
AGAIN = [
    *("--mixlora_enable=True", "--version=llava_v1", "--use_cpu=True", "--seed=1", "--report_to=none"),
    *("--optim=adamw_torch", "--learning_rate=0.02", "--warmup_steps=1", "--lr_scheduler_type=constant_with_warmup"),
    *("--max_steps=3", "--per_device_train_batch_size=2", "--save_strategy=steps", "--save_steps=1"),
]
DEEPSPEED = [program("deepspeed"), "--num_gpus=2", "--master_port=29635", "--module", "llava_mixlora", *RUN]


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory):
    """A trained adapter."""
    output = tmp_path_factory.mktemp("first") / "llava-lora"
    train(ALONE, inputs, output, *FIRST)
    return output


@pytest.fixture(scope="module")
def new_data(tmp_path_factory):
    """Flags of other data than that of the first run."""
    place = tmp_path_factory.mktemp("new-data")
    draw_pictures(place, 6)
    turns = [{"from": "human", "value": "<image>\nwhat is the shape?"}, {"from": "gpt", "value": "circle"}]
    (place / "new.json").write_text(json.dumps([{"image": f"{n}.png", "conversations": turns} for n in range(6)]))
    return [f"--data_path={place / 'new.json'}", f"--image_folder={place}"]


@pytest.fixture(scope="module")
def second(first, new_data, tmp_path_factory):
    """What goes on from it; it is told nothing of the adapter's form, its base, its tower or its projector."""
    output = tmp_path_factory.mktemp("second") / "llava-lora"
    train(ALONE, [*new_data, f"--mixlora_init_from={first}"], output, *AGAIN)
    return output


def learnt(folder):
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    adapter = load_file(folder / "adapter_model.safetensors")
    return {name: each for name, each in {**adapter, **beside}.items() if "mixlora_stats" not in name}


def counted(folder):
    adapter = load_file(folder / "adapter_model.safetensors")
    return {name: each for name, each in adapter.items() if "mixlora_stats" in name}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys() and len(wanted) > 30
    for name in wanted:
        torch.testing.assert_close(found[name].float(), wanted[name].float(), rtol=0, atol=0, msg=name)


def test_new_run_starts_where_the_first_has_ended(first, second):
    assert_equal(learnt(second / "checkpoint-1"), learnt(first))
    moved = [not torch.equal(learnt(second)[name], each) for name, each in learnt(first).items()]
    assert sum(moved) > len(moved) // 2
    state = json.loads((second / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and state["log_history"][-1]["step"] == 3


def test_statistics_and_the_centre_of_words_go_on(first, second):
    before, now = counted(first), counted(second)
    usage = [name for name in before if "usage" in name]
    assert usage and all(now[name].sum() == before[name].sum() * (8 + 6) / 8 for name in usage)
    (words,) = [name for name in before if "words" in name]
    assert (before[words][-1], now[words][-1]) == (8, 14)  # both are within the warm-up


def test_form_and_base_are_those_of_the_first(first, second):
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    for config in configs:
        config["target_modules"].sort()
    differing = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert not differing and configs[0]["base_model_name_or_path"]
    models = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert {name for name in models[0] if models[0][name] != models[1].get(name)} <= {"mm_projector_lr"}


def test_card_tells_what_the_run_went_on_from(first, second):
    assert "| continues | llava-lora (sha256 of adapter_model.safetensors: " in (second / "README.md").read_text()
    assert "continues" not in (first / "README.md").read_text()


def test_continued_adapter_loads_and_answers(first, second, patched):
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.builder import load_pretrained_model

    ids, images = torch.tensor([[1, IMAGE_TOKEN_INDEX, *range(3, 12)]]), torch.rand(1, 3, 16, 16)
    logits = []
    for folder in (first, second / "checkpoint-1", second):
        _, model, _, _ = load_pretrained_model(str(folder), None, folder.name, device="cpu")
        model = model.float()
        logits.append(model(input_ids=ids, images=images).logits)
        assert model.generate(ids, images=images, max_new_tokens=4, do_sample=False).shape[0] == 1
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_run_that_has_checkpoints_goes_on_from_them_and_not_from_the_adapter(first, second, new_data, tmp_path):
    output = shutil.copytree(second, tmp_path / "llava-lora")
    shutil.rmtree(output / "checkpoint-3")
    train(ALONE, [*new_data, f"--mixlora_init_from={first}"], output, *AGAIN)
    assert_equal(learnt(output), learnt(second))
    assert_equal(counted(output) | learnt(output), counted(second) | learnt(second))


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        pytest.param(ALONE, ["--bits=4", "--bf16=True"], id="4-bit", marks=quantizes_on_cpu),
        pytest.param(DEEPSPEED, ["--deepspeed", str(SCRIPTS / "zero2.json")], id="ZeRO-2", marks=deepspeed_on_cpu),
        pytest.param(DEEPSPEED, ["--deepspeed", str(SCRIPTS / "zero3.json")], id="ZeRO-3", marks=deepspeed_on_cpu),
    ],
)
def test_runs_of_other_kinds_start_there_too(first, new_data, tmp_path, launcher, flags):
    train(
        launcher, [*new_data, f"--mixlora_init_from={first}"], tmp_path / "llava-lora", *AGAIN, *flags, "--max_steps=1"
    )
    found, wanted = learnt(tmp_path / "llava-lora"), learnt(first)
    stored = {name: each.to(found[name].dtype) for name, each in wanted.items()}  # in bfloat16, in the first case
    assert_equal(found, stored)


def test_projector_of_a_plain_lora_goes_on(inputs, new_data, tmp_path):
    train(ALONE, inputs, tmp_path / "plain-lora", "--lora_enable=True", "--per_device_train_batch_size=4")
    words = [*new_data, f"--mixlora_init_from={tmp_path / 'plain-lora'}"]
    train(ALONE, words, tmp_path / "llava-lora", *AGAIN, "--lora_r=2", "--max_steps=1")
    plain, found = (
        torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        for folder in (tmp_path / "plain-lora", tmp_path / "llava-lora")
    )
    assert len(plain) == 4 and all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_r=3"], "--lora_r 3: --mixlora_init_from"),
        (["--mixlora_routing=random"], "goes on with routing='ifs'"),
        (["--model_name_or_path=/no/such/model"], "--model_name_or_path /no/such/model: --mixlora_init_from"),
    ],
)
def test_other_form_or_base_ends_in_one_line_before_the_model_is_loaded(first, new_data, tmp_path, flags, named):
    words = [*ALONE, *new_data, f"--mixlora_init_from={first}", f"--output_dir={tmp_path / 'out-lora'}", *AGAIN, *flags]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert named in line and str(first) in line and not Path(tmp_path / "out-lora" / "config.json").exists()
