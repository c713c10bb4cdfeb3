"""The tested versions, and the one that is nearest to what is installed."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llava_mixlora.diagnosis.doctor import Examination
from llava_mixlora.diagnosis.stacks import PEFT_BESIDE, STACKS, differences, nearest, release_series

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_table_and_constraints_agree(stack):
    lines = (SCRIPTS / stack.constraints).read_text().splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in required}
    assert {name: pinned.get(name) for name in stack.versions} == stack.versions


def test_every_constraints_file_is_a_stack():
    assert {stack.constraints for stack in STACKS} == {file.name for file in SCRIPTS.glob("constraints*.txt")}


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_stack_is_nearest_to_itself_and_to_its_later_bugfixes(stack):
    assert nearest(stack.versions) is stack and not differences(stack, stack.versions)
    series = stack.versions["transformers"].rpartition(".")[0]
    others = {**STACKS[0].versions, "transformers": f"{series}.99"}
    assert nearest(others) is stack and "transformers" in differences(stack, others)


def test_every_series_of_peft_that_is_named_is_run():
    run = re.findall(r"\b0\.\d+\.\d+\b", re.search(r"for version in (.*);", (SCRIPTS / "test_peft.sh").read_text())[1])
    pinned = [stack.versions["peft"] for stack in STACKS]
    assert set(PEFT_BESIDE) == set(map(release_series, [*run, *pinned]))
    tests = (ROOT / "tests" / "end_to_end" / "test_peft_versions.py").read_text()
    assert re.findall(r"\d+\.\d+\.\d+", re.search(r"VERSIONS = \((.*)\)", tests)[1]) == run
    always = re.search(r"for version in (.*);", (SCRIPTS / "test.sh").read_text())[1].split()
    assert len(always) == 4 and set(always) < set(run)
    assert f'"peft>={run[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_doctor_says_that_the_method_runs_beside_another_peft():
    line = Examination({**STACKS[1].versions, "peft": "0.18.1"}, {})._stack_line()
    assert "but for peft (0.18.1, tested: 0.21.2, and the method with 0.18 too)" in line
    assert "too)" not in Examination({**STACKS[1].versions, "peft": "0.99.0"}, {})._stack_line()


def test_default_is_nearest_to_nothing():
    assert nearest({}) is STACKS[0]
    assert differences(STACKS[0], {}) == list(STACKS[0].versions)


def test_build_of_pytorch_does_not_count():
    assert not differences(STACKS[0], {**STACKS[0].versions, "torch": STACKS[0].versions["torch"] + "+cu130"})
