"""The package as it is installed from a wheel, in an environment that has nothing else, away from the repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("llava_mixlora", "patches", "scripts", "pyproject.toml", "README.md", "LICENSE")
IMPORT_EVERYTHING = """
import importlib, importlib.resources, pkgutil
import llava_mixlora
from llava_mixlora import MixLoraConfig

modules = [module.name for module in pkgutil.walk_packages(llava_mixlora.__path__, "llava_mixlora.")]
for name in modules:
    try:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    except ImportError as error:  # a framework that is not there, of which one line tells; or what serving asks for
        of_serving = ".serving." in name and error.name in ("starlette", "httpx")
        assert of_serving or ".integrations." in name and "run: pip install" in str(error), name
page = importlib.resources.files("llava_mixlora.serving") / "page" / "index.html"
assert page.is_file(), page
print(len(modules), llava_mixlora.__file__)
"""


def run(*words, cwd, status=0):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, elsewhere):
    """The `bin` of a new environment into which the wheel was installed, with what it asks for."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source, cwd=elsewhere)
    (wheel,) = place.glob("llava_mixlora-*.whl")
    run(sys.executable, "-m", "venv", place / "environment", cwd=elsewhere)
    binaries = place / "environment" / "bin"
    # Not compiled: most of what PyTorch has is never imported here.
    install = (binaries / "python", "-m", "pip", "install", "--quiet", "--no-compile")
    run(*install, "-c", ROOT / "scripts" / "constraints.txt", "torch==2.13.0", wheel, cwd=elsewhere)
    return binaries


def test_every_module_can_be_imported(fresh, elsewhere):
    number, file = run(fresh / "python", "-c", IMPORT_EVERYTHING, cwd=elsewhere).splitlines()[-1].split()
    assert Path(file).is_relative_to(fresh.parent)
    in_the_repository = [*(ROOT / "llava_mixlora").rglob("*.py"), *(ROOT / "patches").glob("*.py")]
    # The package itself is not among its modules.
    assert int(number) == len(in_the_repository) - 1


def test_help_names_every_command(fresh, elsewhere):
    shown = run(fresh / "llava-mixlora", "--help", cwd=elsewhere)
    for command in ("run", "merge", "export-lora", "convert", "eval", "plot", "interference", "patches", "doctor"):
        assert f"\n    {command}" in shown


def test_doctor_says_what_training_lacks_and_nothing_of_the_main_job(fresh, elsewhere):
    shown = run(fresh / "llava-mixlora", "doctor", cwd=elsewhere, status=1)
    assert "main job" not in shown and "finetune_mixlora" not in shown
    assert "no   training: LLaVA, patches, deepspeed" in shown or "no   training: LLaVA" in shown
    assert "mend: pip install --no-deps llava-torch==" in shown
    (constraints,) = [word for word in shown.split() if word.endswith("constraints.txt")]
    assert Path(constraints).read_text() == (ROOT / "scripts" / "constraints.txt").read_text()


def test_settings_of_deepspeed_that_messages_name_are_there(fresh, elsewhere):
    script = "from llava_mixlora.shipped import shipped; print(shipped('zero2.json'))"
    named = run(fresh / "python", "-c", script, cwd=elsewhere).splitlines()[-1]
    for name in ("zero2.json", "zero3.json", "zero3_offload.json"):
        assert (Path(named).parent / name).read_text() == (ROOT / "scripts" / name).read_text()


def test_wheel_is_typed(fresh):
    (marker,) = fresh.parent.glob("lib/python*/site-packages/llava_mixlora/py.typed")
    assert marker.read_text() == ""
