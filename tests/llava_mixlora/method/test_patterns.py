"""Regular expressions over layers' names: those that people have pass, and those that never end do not."""

import re
import time

import pytest

from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL
from llava_mixlora.method.patterns import check_pattern

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

IN_USE = [
    "all-linear",
    "q_proj",
    "q.*",
    r".*\.(q|v)_proj",
    NOT_THE_LANGUAGE_MODEL,
    rf"(?!{NOT_THE_LANGUAGE_MODEL})(.*\.)?(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"model\.layers\.([0-9]|1[0-9])\.self_attn\.[qkvo]_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj).*",
    r"^(language_model(?=\.).*\.(k_proj|gate_proj|v_proj|down_proj|q_proj|o_proj|up_proj))$",
    r".*language_model.*\d{1,2}.*proj",
]
ENDLESS = [
    r"(a+)+$",
    r"(.*)*x",
    r"(.+\.)+x",
    r"(a|a)*b",
    r"(a|ab)+c",
    r"(?:.?){40}x",
    ".?" * 40 + "x",
    ".*" * 5 + "x",
    r"(?=(.*)*x)y",
    r"(.*)\1\1\1x",
    "(x|x)" * 30,
    r"((a{0,9}){0,9}){0,9}x",
]


@pytest.mark.parametrize("pattern", IN_USE)
def test_expressions_in_use_pass(pattern):
    check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_expressions_without_end_are_refused(pattern):
    said = message_of(check_pattern, "target_modules", pattern)
    assert said.startswith(f"target_modules={pattern!r}: matching a name could take minutes") or "..." in said


@pytest.mark.parametrize("pattern", ["(q_proj", "*", "[", "(?P<x", "(" * 3000 + ")" * 3000, "a" * 5000])
def test_what_is_no_usable_expression_is_refused(pattern):
    assert "target_modules=" in message_of(check_pattern, "target_modules", pattern)


@pytest.mark.parametrize("pattern", [*IN_USE, ".*.*.*x", ".?" * 20 + "#", r".*\w+.*#"])
def test_worst_of_what_passes_is_over_soon(pattern):
    check_pattern("target_modules", pattern)
    started = time.perf_counter()
    re.fullmatch(pattern, "base_model.model.model.layers.31.self_attn.q_proj.mm_projectoooor")
    assert time.perf_counter() - started < 1


def test_what_an_expression_becomes_a_part_of_counts():
    check_pattern("rank_pattern", ".*x.*y", r"(.*\.)?({})$")
    assert "rank_pattern" in message_of(check_pattern, "rank_pattern", ".*x.*y.*z", r"(.*\.)?({})$")
