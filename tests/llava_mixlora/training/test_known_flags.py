"""The command line as upstream's parser reads it, without the defaults."""

from dataclasses import dataclass, field
from typing import Optional

import pytest

from llava_mixlora.training.known_flags import read_flags

from ...tiny import message_of


@dataclass
class Model:
    mm_projector_type: Optional[str] = field(default="linear")
    mm_vision_select_layer: Optional[int] = field(default=-1)


@dataclass
class Run:
    output_dir: str
    model_max_length: int = field(default=512)
    tune_mm_mlp_adapter: bool = field(default=False)
    tf32: bool = field(default=True)


def read(*words):
    return read_flags((Model, Run), words)


def test_only_what_is_given_has_a_value():
    given, defaults = read("--mm_vision_select_layer", "-2", "--tune_mm_mlp_adapter", "--tf32=False")
    assert given == {"mm_vision_select_layer": -2, "tune_mm_mlp_adapter": True, "tf32": False}
    assert defaults["mm_projector_type"] == "linear" and defaults["model_max_length"] == 512
    assert read()[0] == {}


@pytest.mark.parametrize("flag", ["--mm_projector_typ", "--mm_projector_tpye=linear", "--mm-projector"])
def test_unknown_flag_is_named_with_the_nearest(flag):
    message = message_of(read, flag, "linear")
    assert message.startswith(f"{flag.partition('=')[0]}: no flag") and "did you mean --mm_projector_type?" in message


def test_unknown_flag_like_no_other_is_named():
    message = message_of(read, "--zzz", "1")
    assert message.startswith("--zzz: no flag of training") and "--help" in message


def test_word_without_a_flag_is_named():
    assert "again: belongs to no flag" in message_of(read, "--output_dir", "out", "again")


@pytest.mark.parametrize("words", [["--model_max_length", "long"], ["--tf32", "perhaps"]])
def test_value_of_another_kind_is_one_line(words):
    message = message_of(read, *words)
    assert words[0] in message and words[1] in message
