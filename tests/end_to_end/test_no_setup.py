"""`NO_SETUP=1`: the scripts where nothing can be installed, with the packages that are there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .main_job import ROOT

pytestmark = pytest.mark.slow

NEEDED = ("llava_mixlora", "patches", "scripts", "playground", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def clone(tmp_path):
    """What the scripts need of the repository, without what they have made."""
    left_out = shutil.ignore_patterns("cache", "output", "__pycache__", "*.egg-info")
    for name in NEEDED:
        source, target = ROOT / name, tmp_path / "clone" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree(source, target, ignore=left_out) if source.is_dir() else shutil.copy(source, target))
    return tmp_path / "clone"


def sourced(clone, then, hidden=()):
    """A shell that has sourced setup.sh in the clone, and run `then`; packages that are `hidden` are not there."""
    (clone.parent / "hiding").mkdir()
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)
    (clone.parent / "hiding" / "sitecustomize.py").write_text(f"import sys\n{hide}", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= {
        "NO_SETUP": "1",
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(clone.parent / "hiding"),
    }
    command = ["bash", "-c", f"set -e; source scripts/setup.sh; {then}"]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)


def test_the_repository_runs_with_the_packages_that_are_there(clone):
    asked = "import llava_mixlora.patches as it, playground; print(it.__file__); print(playground.__file__)"
    done = sourced(clone, f"llava-mixlora --help; python -c '{asked}'; bash scripts/merge_mixlora.sh --help")
    assert done.returncode == 0, done.stderr
    patches, playground = (line for line in done.stdout.splitlines() if line.endswith("__init__.py"))
    assert patches == str(clone / ".no-setup" / "site" / "llava_mixlora" / "patches" / "__init__.py")
    assert playground == str(clone / "playground" / "__init__.py")
    assert not (clone / "build").exists() and not [*clone.glob("*.egg-info")] and not (clone / ".venv").exists()


def test_packages_that_are_missing_are_named(clone):
    done = sourced(clone, "echo went on", hidden=("shortuuid", "aenum"))
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "NO_SETUP=1, and these packages are not there: aenum, shortuuid" in done.stderr
