"""Bad input is named in one line before a model is loaded."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from llava_mixlora.training.given_flags import given_flags
from llava_mixlora.training.preflight import check_quantization, check_training_inputs, note_compiler_locks

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

SCRIPTS = Path(__file__).parents[3] / "scripts"
TEXT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A circle."}]
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]


@pytest.fixture
def run(tmp_path):
    """Flags of a run whose inputs are all there."""
    for folder in ("model", "tower", "images"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "1.png")
    (tmp_path / "projector.bin").write_bytes(b"")
    (tmp_path / "data.json").write_text(
        json.dumps([{"image": "1.png", "conversations": TURNS}, {"conversations": TEXT}])
    )
    return {
        "mixlora_enable": "True",
        "model_name_or_path": tmp_path / "model",
        "vision_tower": tmp_path / "tower",
        "pretrain_mm_mlp_adapter": tmp_path / "projector.bin",
        "data_path": tmp_path / "data.json",
        "image_folder": tmp_path / "images",
        "output_dir": tmp_path / "output",
    }


def check(run, **changes):
    check_training_inputs([f"--{name}={value}" for name, value in {**run, **changes}.items() if value is not None])


def test_complete_inputs_pass_and_the_output_folder_exists(run):
    check(run, unknown_flag="of upstream")
    assert run["output_dir"].is_dir() and not list(run["output_dir"].iterdir())


def test_flags_may_be_given_in_two_words(run):
    words = [word for name, value in run.items() for word in (f"--{name}", str(value))]
    check_training_inputs(words)
    words[words.index(str(run["data_path"]))] = "gone.json"
    assert "gone.json" in message_of(check_training_inputs, words)


@pytest.mark.parametrize("enabled", [None, "False", "false", "0"])
def test_runs_without_an_adapter_are_not_checked(run, enabled):
    check(run, mixlora_enable=enabled, data_path="/no/such.json")
    assert not run["output_dir"].exists()


def test_runs_of_plain_lora_are_checked_too(run):
    message = message_of(check, run, mixlora_enable=None, lora_enable="True", data_path="/no/such.json")
    assert "/no/such.json: no such file" in message


def test_enabling_without_a_value_counts(run):
    words = [f"--{name}={value}" for name, value in run.items() if name != "mixlora_enable"]
    assert "gone.json" in message_of(check_training_inputs, [*words, "--data_path=gone.json", "--mixlora_enable"])


@pytest.mark.parametrize("flag", ["model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path"])
@pytest.mark.parametrize("gone", ["/no/such/place", "./gone/place"])
def test_missing_path_is_named(run, flag, gone):
    message = message_of(check, run, **{flag: gone})
    assert gone in message and "no such" in message
    assert not run["output_dir"].exists()


@pytest.mark.parametrize(
    "flag, name", [("model_name_or_path", "lmsys/vicuna-7b-v1.5"), ("vision_tower", "openai/clip")]
)
def test_hub_names_pass(run, flag, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what is not here is not waited for
    check(run, **{flag: name})


def test_missing_output_folder_flag_is_named(run):
    del run["output_dir"]
    assert "--output_dir is missing" in message_of(check, run)


def test_missing_data_path_flag_is_named(run):
    assert "--data_path is missing" in message_of(check, run, data_path=None)


@pytest.mark.parametrize("place", ["data.json", "data.json/below"])
def test_output_that_cannot_be_a_folder_is_named(run, tmp_path, place):
    message = message_of(check, run, output_dir=tmp_path / place)
    assert str(tmp_path / place) in message and "cannot be written" in message and "--output_dir" in message


@pytest.mark.parametrize("bits", ["3", "0", "-4", "four", "4.0"])
@pytest.mark.parametrize("enabled", ["True", "False"])
def test_other_bits_than_4_8_and_16_are_named_for_every_adapter(run, bits, enabled):
    message = message_of(check, run, bits=bits, mixlora_enable=enabled)
    assert f"--bits {bits}: expected 4 or 8" in message and "16" in message


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_bits_that_upstream_knows_pass(bits):
    check_quantization(given_flags(["--bits", bits]))
    check_quantization(given_flags([f"--bits={bits}"]))
    check_quantization(given_flags([]))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_missing_bitsandbytes_is_named_with_how_to_install_it(monkeypatch, bits):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    message = message_of(check_quantization, {"bits": bits})
    assert f"--bits {bits}" in message and "pip install 'llava-mixlora[qlora]'" in message
    check_quantization(given_flags(["--bits", "16"]))


@pytest.fixture
def deepspeed(tmp_path):
    """Writes a DeepSpeed configuration; gives its path."""

    def deepspeed(content):
        (tmp_path / "zero.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / "zero.json")

    return deepspeed


@pytest.mark.parametrize("bits", ["4", "8"])
def test_zero_3_with_quantized_weights_is_named(deepspeed, bits):
    config = deepspeed({"zero_optimization": {"stage": 3}})
    message = message_of(check_quantization, {"bits": bits, "deepspeed": config})
    assert f"--bits {bits}" in message and config in message and "ZeRO-3" in message and "zero2.json" in message


@pytest.mark.parametrize("content", [{"zero_optimization": {"stage": 2}}, {"zero_optimization": True}, {}])
def test_other_zero_stages_pass_with_quantized_weights(deepspeed, content):
    check_quantization(given_flags(["--bits=4", f"--deepspeed={deepspeed(content)}"]))
    check_quantization(given_flags(["--bits=4", f"--deepspeed={SCRIPTS / 'zero2.json'}"]))


def test_zero_3_passes_with_16_bit_weights(deepspeed):
    check_quantization(given_flags(["--deepspeed", deepspeed({"zero_optimization": {"stage": 3}})]))


@pytest.mark.parametrize("content, named", [("{", "not valid JSON"), ("[]", "got list")])
def test_damaged_deepspeed_configuration_is_named(deepspeed, content, named):
    assert named in message_of(check_quantization, {"bits": "4", "deepspeed": deepspeed(content)})


def test_missing_deepspeed_configuration_is_named():
    message = message_of(check_quantization, {"bits": "4", "deepspeed": "no/zero.json"})
    assert "--deepspeed no/zero.json: no such file" in message


@pytest.mark.parametrize("flags", [["--deepspeed", "zero2.json"], ["--deepspeed=zero2.json"], []])
def test_lock_that_deepspeed_would_wait_for_is_named(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    note_compiler_locks(given_flags(flags))
    assert capsys.readouterr().out == ""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    note_compiler_locks(given_flags(flags))
    assert (str(lock) in capsys.readouterr().out) == bool(flags)
