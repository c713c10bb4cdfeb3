"""Takes each patch away, one at a time, and shows which test notices.

    bash scripts/test_patches.sh [--only WORD] [--list]

A patch is taken out of a temporary copy of the repository, and the tests run there until one fails: first those of the
patch's own module, then the other quick ones, then those that start training. The test that failed must pass in an
untouched copy. Status 1: some patch was missed by all tests. Patches that the installed versions do not need are listed
and left for the stack that does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("llava_mixlora", "patches", "tests", "scripts", "playground", "pyproject.toml", "README.md")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "cache", "output", "results")
# Where a module's patches, or the one of a symbol (for some versions), show first.
CLOSEST = {
    "deepspeed_zero3": [
        "end_to_end/test_many_processes.py::test_loss_curve_of_two_processes_is_that_of_one[zero3-float32]",
        "end_to_end/test_many_processes.py::test_loss_curve_of_two_processes_is_that_of_one[zero3-bfloat16]",
    ],
    "llava_train": ["llava_mixlora/test_cli.py", "end_to_end/test_launchers.py"],
    "llava_train LlavaLlamaForCausalLM": ["end_to_end/test_mistral.py"],
    "llava_mistral": ["end_to_end/test_mistral.py"],
    "llava_train_evaluation": ["end_to_end/test_held_out.py"],
    "llava_trainer_evaluation": ["end_to_end/test_held_out.py"],
    "llava_trainer_init_from": ["end_to_end/test_init_from.py"],
    "llava_cli": ["patches/test_llava_cli.py", "end_to_end/test_serving.py"],
    "llava_model_worker": ["end_to_end/test_serving.py"],
    "peft_peft_model": ["llava_mixlora/adapters/test_trained_beside.py"],
    "transformers_peft": ["llava_mixlora/adapters/test_trained_beside.py"],
    "llava_trainer_checkpoints LLaVATrainer.train transformers<5": [
        "end_to_end/test_checkpoints.py::test_run_killed_after_its_last_step_makes_no_further_step"
    ],
    "llava_trainer_checkpoints LLaVATrainer._load_best_model": ["end_to_end/test_held_out.py"],
    "peft_save_and_load": ["llava_mixlora/method/test_model.py", "llava_mixlora/method/test_registration.py"],
    "transformers_peft_statistics": ["llava_mixlora/method/test_model.py"],
    "transformers_trainer Trainer._load_rng_state": [
        "end_to_end/test_checkpoints.py::test_killed_run_goes_on_as_if_nothing_had_happened"
    ],
    **{
        f"llava_trainer_checkpoints LLaVATrainer.{method}": [f"end_to_end/test_checkpoints.py::{test}"]
        for method, test in {
            "__init__": "test_terminated_run_saves_and_a_damaged_checkpoint_is_skipped",
            "_get_train_sampler": "test_killed_run_goes_on_as_if_nothing_had_happened",
            "save_model": "test_checkpoint_loads_as_the_final_output_does",
            "_save_checkpoint": "test_full_disk_is_one_line_and_leaves_earlier_checkpoints_intact",
            "train": "test_terminated_run_saves_and_a_damaged_checkpoint_is_skipped",
            "_load_from_checkpoint": "test_killed_run_goes_on_as_if_nothing_had_happened",
            "_run_epoch": "test_run_killed_after_its_last_step_makes_no_further_step",
        }.items()
    },
}
LAST = ["launchers", "checkpoints", "qlora", "mistral", "serving", "upstream_scripts", "many_processes"]
# About the list of patches itself, so that a shorter one proves nothing; and about where files lie.
NO_BEHAVIOUR = ["patches/test_patch.py", "llava_mixlora/diagnosis/test_patch_table.py", "llava_mixlora/test_layout.py"]


@dataclass(frozen=True)
class Entry:
    """One `Patch(...)` in the tuple `PATCHES` of a module.

    Args:
        module: name of the file in patches/.
        number: place in the tuple.
        needed: whether the installed versions need it.
        symbol: what it replaces in its upstream module.
        versions: that it is for; empty: all.
    """

    module: str
    number: int
    needed: bool
    symbol: str
    versions: str

    @property
    def title(self) -> str:
        return f"{self.module}[{self.number}] {self.symbol} {self.versions}".strip()


def entries() -> Iterator[Entry]:
    """Every patch, in the order of the files."""
    for file in sorted((ROOT / "patches").glob("*.py")):
        if file.stem in ("__init__", "patch"):
            continue
        patches = import_module(f"llava_mixlora.patches.{file.stem}").PATCHES
        for number, patch in enumerate(patches):
            versions = " ".join(f"{package}{spec}" for package, spec in patch.requires.items())
            yield Entry(file.stem, number, patch.needed, patch.target.partition(":")[2], versions)


def copy_repository(place: Path, without: Entry | None) -> None:
    """Copy what tests need, with the patches where an installed package has them."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=NOT_COPIED)
        else:
            shutil.copy(source, place / name)
    (place / "llava_mixlora" / "patches").symlink_to(Path("..") / "patches")
    (place / "watch_failures.py").write_text(WATCH)
    if without is not None:
        file = place / "patches" / f"{without.module}.py"
        with file.open("a", encoding="utf-8") as source:
            source.write(f"\nPATCHES = (*PATCHES[:{without.number}], *PATCHES[{without.number + 1} :])\n")


# A plugin of pytest: sees that the copy is what is tested, and notes what failed first.
WATCH = """
import importlib.util, json, os, sys
from pathlib import Path

HERE = Path(__file__).parent

def pytest_configure(config):
    assert Path(importlib.util.find_spec("llava_mixlora").origin).is_relative_to(HERE)

def note(report):
    if report.failed and not (HERE / "failed.json").exists():
        lines = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        reason = lines[0] if lines else str(report.longrepr).splitlines()[-1]
        (HERE / "failed.json").write_text(json.dumps([report.nodeid, reason]))

pytest_runtest_logreport = pytest_collectreport = note

def pytest_sessionfinish():
    patches = sys.modules.get("llava_mixlora.patches")
    assert patches is None or Path(patches.__file__).is_relative_to(HERE)
"""


def run_tests(place: Path, tests: list[str]) -> tuple[str, str] | None:
    """Run them in a copy until one fails; gives its name and the reason."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "watch_failures", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(words, cwd=place, env=environment(place), capture_output=True, text=True)
    noted = place / "failed.json"
    if noted.exists():
        name, reason = json.loads(noted.read_text())
        noted.unlink()
        return name, reason
    if done.returncode != 0:
        raise SystemExit(
            f"error: pytest ended with status {done.returncode} and no test failed:\n{done.stdout[-2000:]}"
        )
    return None


def environment(place: Path) -> dict[str, str]:
    """Of the tests, and of the programs that they start: the copy comes before what is installed."""
    return {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}


def check_copy_is_imported(place: Path) -> None:
    """Stop unless a process that a process started imports the copy, from any folder.

    Raises:
        SystemExit: with the path that it imports.
    """
    script = "import llava_mixlora.patches as patches; print(patches.__file__)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}], cwd='/', check=True)"
    words = [sys.executable, "-c", start]
    done = subprocess.run(words, env=environment(place), capture_output=True, text=True, check=True, cwd="/")
    imported = done.stdout.splitlines()[-1]  # DeepSpeed may say something first
    if not Path(imported).is_relative_to(place):
        raise SystemExit(f"error: programs started by tests import {imported}, expected a file in {place}")


def tests_for(entry: Entry) -> Iterator[list[str]]:
    """What to run: the tests that should notice, when none does the quick ones, and last those that start training."""
    tests = ROOT / "tests"
    own = [f"patches/test_{entry.module}.py"] if (tests / "patches" / f"test_{entry.module}.py").is_file() else []
    names = (f"{entry.module} {entry.symbol} {entry.versions}", f"{entry.module} {entry.symbol}", entry.module)
    closest = next((CLOSEST[name] for name in names if name in CLOSEST), [])
    yield [f"tests/{name}" for name in own + closest] or ["tests/patches/test_llava_train.py"]
    quick = [*sorted(tests.glob("patches/test_*.py")), *sorted(tests.glob("llava_mixlora/**/test_*.py"))]
    names = [str(file.relative_to(tests)) for file in quick]
    yield [f"tests/{name}" for name in names if name not in (*NO_BEHAVIOUR, *own)]
    yield [f"tests/end_to_end/test_{name}.py" for name in LAST]


def main() -> int:
    """Try them all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/test_patches.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORD", action="append", help="patches whose title contains it; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the patches, and stop")
    given = parser.parse_args()
    chosen = [entry for entry in entries() if not given.only or any(word in entry.title for word in given.only)]
    if not chosen:
        parser.error(f"--only {' '.join(given.only)}: no such patch; expected a part of a title that --list shows")
    if given.list:
        print("\n".join(f"{'' if entry.needed else 'not needed here: '}{entry.title}" for entry in chosen))
        return 0
    needed = [entry for entry in chosen if entry.needed]
    missed = []
    with tempfile.TemporaryDirectory(prefix="llava-mixlora-patches-") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        copy_repository(whole, None)
        check_copy_is_imported(whole)
        passes_whole: set[str] = set()
        for position, entry in enumerate(needed, 1):
            begun = time.monotonic()
            place = Path(folder) / f"without-{entry.module}-{entry.number}"
            place.mkdir()
            copy_repository(place, entry)
            found = next(filter(None, (run_tests(place, tests) for tests in tests_for(entry))), None)
            shutil.rmtree(place)
            if found is not None and found[0] not in passes_whole:
                if (broken := run_tests(whole, [found[0]])) is not None:
                    raise SystemExit(f"error: {broken[0]} fails with every patch in place ({broken[1]}); mend it first")
                passes_whole.add(found[0])
            if found is None:
                missed.append(entry)
            told = "NOT NOTICED" if found is None else f"{found[0]}\n{'':15}{found[1][:160]}"
            print(
                f"[{position}/{len(needed)}] {time.monotonic() - begun:4.0f} s  {entry.title}\n{'':15}{told}",
                flush=True,
            )
    for entry in chosen:
        if not entry.needed:
            print(f"not needed here, run it in that stack: {entry.title}")
    print(f"{len(needed) - len(missed)} of {len(needed)} patches are noticed when they are missing")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
