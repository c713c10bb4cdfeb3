"""`llava-mixlora doctor` in real processes, with packages hidden or broken through PYTHONPATH."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from llava_mixlora.cli import main
from llava_mixlora.diagnosis.doctor import FEATURES
from llava_mixlora.diagnosis.stacks import STACKS, nearest


@pytest.fixture
def doctor(tmp_path):
    """Runs it; gives the finished process."""

    def doctor(*words, hide=(), command="doctor", **variables):
        lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in hide)]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
        words = [sys.executable, "-m", "llava_mixlora", command, *words]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        # On a processor with AVX512-BF16 bitsandbytes says that it found no kernels package to use it with, and where
        # accelerate imports DeepSpeed, that says that there is no GPU.
        said = ("gemm_4bit_forward", "real_accelerator.py")
        done.stderr = "".join(line for line in done.stderr.splitlines(True) if not any(word in line for word in said))
        return done

    return doctor


def told(done, status):
    """What a feature's lines say, by feature, of a screen."""
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert done.stderr == ""
    features, feature = {}, None
    for line in done.stdout.partition("what works\n")[2].splitlines():
        if line.startswith("  yes  ") or line.startswith("  no   "):
            feature, _, broken = line[7:].partition(": ")
            features[feature] = {"works": line.startswith("  yes"), "broken": broken, "mend": []}
        else:
            features[feature]["mend"].append(line.strip().removeprefix("mend: "))
    assert list(features) == list(FEATURES)
    assert all(entry["works"] != bool(entry["mend"]) for entry in features.values())
    return features


@pytest.mark.slow
def test_whole_environment_runs_the_main_job(doctor):
    done = doctor()
    features = told(done, 0)
    for feature in ("main job", "training", "QLoRA, 4 bits", "QLoRA, 8 bits", "evaluation", "evaluation plots"):
        assert features[feature]["works"], feature
    versions = {name: importlib.metadata.version(name) for name in STACKS[0].versions}
    assert f'tested stack "{nearest(versions).name}"' in done.stdout
    for name, version in versions.items():
        assert any(line.split()[:2] == [name, version] for line in done.stdout.splitlines())


@pytest.mark.slow
def test_what_only_some_need_leaves_the_main_job_working(doctor, tmp_path):
    """No compiler either, and a GPU that PyTorch, built for the CPU, does not see."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.15\n")
    (programs / "nvidia-smi").chmod(0o755)
    hidden = ["bitsandbytes", "fastapi", "lmms_eval", "loguru", "flash_attn"]
    done = doctor("--json", hide=hidden, PATH=str(programs))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    works = {feature: entry["works"] for feature, entry in found["features"].items()}
    assert works["main job"] and works["evaluation plots"]
    assert found["versions"]["bitsandbytes"] is None
    for feature, command in {
        "QLoRA, 4 bits": f"pip install bitsandbytes=={STACKS[0].versions['bitsandbytes']}",
        "QLoRA, 8 bits": f"pip install bitsandbytes=={STACKS[0].versions['bitsandbytes']}",
        "DeepSpeed, ZeRO": "sudo apt install g++ python3-dev",
        "training on a GPU": f"pip install --force-reinstall torch=={STACKS[0].versions['torch']}",
        "serving": "fastapi",
        "lmms-eval": "loguru",
    }.items():
        assert not works[feature]
        (mend,) = found["features"][feature]["mend"]
        assert command in mend
    assert "--no-deps lmms-eval==0.7.3" in found["features"]["lmms-eval"]["mend"][0]
    assert "550.54.15" in found["parts"]["GPU"]["found"]


@pytest.mark.slow
def test_missing_needs_of_the_main_job_are_named_with_what_mends_them(doctor):
    features = told(doctor(hide=["deepspeed", "easy_vqa", "sklearn", "einops", "matplotlib"]), 1)
    for feature in ("main job", "training"):
        assert "pip install einops" in features[feature]["mend"]
        assert f"pip install deepspeed=={STACKS[0].versions['deepspeed']}" in features[feature]["mend"]
    assert "pip install easy-vqa==1.0 matplotlib scikit-learn" in features["main job"]["mend"]
    assert features["evaluation plots"]["mend"] == ["pip install matplotlib scikit-learn"]
    assert features["evaluation"]["mend"] == ["pip install einops"]


@pytest.mark.slow
def test_missing_llava_is_named(doctor):
    features = told(doctor(hide=["llava"]), 1)
    assert features["main job"]["mend"] == ["pip install --no-deps llava-torch==1.2.2.post1"]
    assert features["main job"]["broken"] == "LLaVA"


@pytest.mark.slow
def test_fork_whose_symbol_is_gone_is_one_line(doctor, tmp_path):
    fork = shutil.copytree(importlib.util.find_spec("llava").submodule_search_locations[0], tmp_path / "llava")
    builder = fork / "model" / "builder.py"
    builder.write_text(builder.read_text().replace("def load_pretrained_model(", "def load_my_model("))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "earthy"\nversion = "0.4"\n')
    done = doctor()
    features = told(done, 1)
    assert features["main job"]["broken"] == "patches"
    assert features["main job"]["mend"] == ["no command does; see above"]  # PyPI's LLaVA would not be that fork
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  patches"))
    assert "cannot patch llava.model.builder:load_pretrained_model" in line
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  LLaVA  "))
    assert f"llava in {fork} (earthy 0.4 by its pyproject.toml); warning: it hides another llava, " in line
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  llava-torch"))
    assert line.split()[:2] == ["llava-torch", "-"]


@pytest.mark.slow
def test_only_llava_that_is_there_is_judged_whatever_its_name(doctor, tmp_path):
    """Its training too: here it imports something that is not installed, in a module whose failure it hides."""
    fork = shutil.copytree(importlib.util.find_spec("llava").submodule_search_locations[0], tmp_path / "earthy")
    for file in fork.rglob("*.py"):
        file.write_text(file.read_text().replace("from llava", "from earthy").replace("import llava", "import earthy"))
    arch = fork / "train" / "llava_trainer.py"
    arch.write_text("import timm_of_earth\n" + arch.read_text())
    done = doctor(hide=["llava"])
    features = told(done, 1)
    assert features["training"]["broken"] == "LLaVA's training" and features["evaluation"]["works"]
    assert f"  LLaVA                   earthy in {fork}\n" in done.stdout
    assert f"No module named 'timm_of_earth' ({fork}/train/llava_trainer.py, line 1)" in done.stdout


@pytest.mark.parametrize("command", [["doctor"], ["patches"], ["check", "data.json"]])
def test_package_that_is_no_llava_is_named(capsys, command):
    assert main([*command, "--package", "json.decoder"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("llava-mixlora: error: --package json.decoder: ") and "expected one of llava" in line


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["peft", "transformers"])
def test_missing_library_is_one_line_for_every_command(doctor, missing):
    features = told(doctor(hide=[missing]), 1)
    others = {name: importlib.metadata.version(name) for name in STACKS[0].versions if name != missing}
    version = nearest(others).versions[missing]
    assert features["main job"]["mend"] == [f"pip install {missing}=={version}"]
    for command in (["inspect", "ADAPTER"], ["run", "-m", "llava.train.train"], ["doctor", "--estimate", "MODEL"]):
        done = doctor(*command[1:], command=command[0], hide=[missing])
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("llava-mixlora: error: ") and missing in line
        assert "llava-mixlora doctor" in line


def test_library_that_cannot_be_loaded_says_why(doctor, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    done = doctor()
    assert "installed, but cannot be imported: libtorch_cpu.so: cannot open shared object file" in done.stdout
    mend = f"pip install --force-reinstall torch=={STACKS[0].versions['torch']}"
    assert told(done, 1)["main job"]["mend"] == [mend]


def test_name_that_could_not_be_imported_says_why(doctor, tmp_path):
    script = "import llava_mixlora\nfrom llava_mixlora import MixLoraConfig"
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None")
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: llava_mixlora.MixLoraConfig: ") and "peft" in last


def test_flag_that_describes_a_run_needs_the_model(capsys):
    assert main(["doctor", "--bits", "4"]) == 1
    message = "llava-mixlora: error: --bits 4 describes a run for --estimate MODEL, which is missing\n"
    assert capsys.readouterr().err == message
