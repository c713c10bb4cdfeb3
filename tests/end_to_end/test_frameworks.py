"""MIXLORA in the frameworks that people train with, each in programs of its own.

A framework lies in a folder of `.stacks/`, where `scripts/test_frameworks.sh`, and nothing else, installs them.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .framework_runs import FRAMEWORKS, RUNS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "test_frameworks.sh"
FOLDERS = dict(re.findall(r"packages_in (\.stacks/([a-z-]+)-[\d.]+) ", SCRIPT.read_text(encoding="utf-8")))
FOLDERS = {name: ROOT / folder for folder, name in FOLDERS.items()}


@functools.cache
def outcomes(name, place):
    """What the runs gave in a framework."""
    if not FOLDERS[name].is_dir():
        pytest.skip(f"{FOLDERS[name].relative_to(ROOT)} is missing; bash scripts/test_frameworks.sh installs it")
    path = os.pathsep.join(map(str, [FOLDERS[name], *filter(None, [os.environ.get("PYTHONPATH")])]))
    command = [sys.executable, "-m", "tests.end_to_end.framework_runs", name, str(place / f"{name}.json")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((place / f"{name}.json").read_text())
    assert FOLDERS[name].name == f"{name}-{written['version']}"
    return written["runs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("frameworks")


def test_every_framework_is_installed_by_the_script():
    assert set(FOLDERS) == set(FRAMEWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("run", [run.__name__ for run in RUNS])
def test_framework(name, run, place):
    went_wrong = outcomes(name, place)[run]
    assert went_wrong is None, went_wrong
