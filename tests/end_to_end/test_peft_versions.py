"""MIXLORA beside the versions of PEFT that people have pinned, each in a program of its own.

A version lies in a folder `.stacks/peft-VERSION`: `scripts/test.sh` installs one for each way in which PEFT differs,
`scripts/test_peft.sh` all of them. PEFT before 0.20 runs with the transformers of its time, in `.stacks/trl-0.24`;
transformers 5 asks for 0.20 where it adds and sets adapters itself.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from .peft_version_runs import RUNS

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.13.2", "0.14.0", "0.15.2", "0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.0")
OF_ITS_TIME = ROOT / ".stacks" / "trl-0.24"
"""Holds transformers 4.57."""


@functools.cache
def outcomes(version, place):
    """What the runs gave beside a version of PEFT."""
    folders = [ROOT / ".stacks" / f"peft-{version}", *([] if Version(version) >= Version("0.20") else [OF_ITS_TIME])]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        pytest.skip(f"{missing[0].relative_to(ROOT)} is missing; bash scripts/test_peft.sh installs all versions")
    path = os.pathsep.join(map(str, [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]))
    command = [sys.executable, "-m", "tests.end_to_end.peft_version_runs", str(place / f"{version}.json")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((place / f"{version}.json").read_text())
    assert written["peft"] == version
    return written["runs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("run", RUNS)
def test_older_peft(version, run, place):
    went_wrong = outcomes(version, place)[run]
    assert went_wrong is None, went_wrong
