"""The tested versions, and the one that is nearest to what is installed."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llava_mixlora.diagnosis.stacks import STACKS, differences, nearest

pytestmark = pytest.mark.one_stack

SCRIPTS = Path(__file__).parents[3] / "scripts"


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


def test_default_is_nearest_to_nothing():
    assert nearest({}) is STACKS[0]
    assert differences(STACKS[0], {}) == list(STACKS[0].versions)


def test_build_of_pytorch_does_not_count():
    assert not differences(STACKS[0], {**STACKS[0].versions, "torch": STACKS[0].versions["torch"] + "+cu130"})
