"""What a command line says before upstream parses it."""

import pytest

from llava_mixlora.training.given_flags import given_flags, is_true, trains_adapter

pytestmark = pytest.mark.one_stack


def test_both_spellings_of_flags_are_read_and_the_last_one_counts():
    words = ["--data_path", "a.json", "--output-dir=out=1", "--mm_vision_select_layer", "-2", "--data_path=b.json"]
    assert given_flags(words) == {"data_path": "b.json", "output_dir": "out=1", "mm_vision_select_layer": "-2"}


def test_a_flag_without_a_word_is_turned_on():
    given = given_flags(["--mixlora_enable", "--bf16", "False", "--tf32"])
    assert is_true(given, "mixlora_enable") and is_true(given, "tf32")
    assert not is_true(given, "bf16") and not is_true(given, "fp16") and not is_true({"fp16": "perhaps"}, "fp16")


@pytest.mark.parametrize(
    "flag, trains", [("mixlora_enable", True), ("lora_enable", True), ("tune_mm_mlp_adapter", False)]
)
def test_adapters_are_trained_by_two_flags(flag, trains):
    assert trains_adapter(given_flags([f"--{flag}", "True"])) is trains
