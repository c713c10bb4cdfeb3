"""The console script, mostly as a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from llava_mixlora import __version__
from llava_mixlora.cli import COMMANDS, main

SCRIPT = """
import sys
import llava.train.train, peft, transformers.trainer
from llava_mixlora import patches
assert __name__ == "__main__"
left = [patch for patch in patches.PATCHES if patch.needed and not patch.program and not patch.applied]
assert all(patch.kind == "upstream fault" and patch.problem is None for patch in left), left
assert len(left) < 5  # what LLaVA itself does right
assert hasattr(llava.train.train.TrainingArguments, "mixlora_config")
import beside
print("ARGUMENTS", sys.argv)
print("BESIDE", beside.VALUE)
"""


def command(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "llava_mixlora", *words], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 42\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.slow
def test_script_runs_as_main_with_the_patches_and_its_own_arguments(script, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = command("--local_rank=1", "run", str(script), "-m", "--help", "--lora_r", "4", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"ARGUMENTS {[str(script), '--local_rank=1', '-m', '--help', '--lora_r', '4']}" in done.stdout
    assert "BESIDE 42" in done.stdout


@pytest.mark.slow
def test_patched_module_runs_with_its_patches():
    done = command("run", "-m", "llava.train.train", "--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--mixlora_enable", "--mixlora_preset", "--evaluation_strategy", "--lora_enable"):
        assert flag in done.stdout


def test_bad_input_is_one_line_and_status_one(tmp_path):
    flags = ["--mixlora_enable", "--data_path", str(tmp_path / "gone.json"), "--output_dir", str(tmp_path / "out")]
    done = command("run", "-m", "llava.train.train_mem", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llava-mixlora: error: ") and "gone.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def error_of(capsys, *words):
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("llava-mixlora: error: ")
    return line


@pytest.mark.parametrize("words", [["run"], ["run", "-m"]])
def test_nothing_to_run_is_an_error(capsys, words):
    assert "nothing to run" in error_of(capsys, *words)


def test_unknown_module_and_script_are_named(capsys, patched):
    assert "-m no.such.module" in error_of(capsys, "run", "-m", "no.such.module")
    assert "-m llava.no_such" in error_of(capsys, "run", "-m", "llava.no_such")
    assert "gone.py: no such script" in error_of(capsys, "run", "gone.py")


@pytest.mark.parametrize("words", [[], ["juggle"], ["--no-such-flag"]])
def test_unknown_subcommand_is_a_usage_error(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: llava-mixlora" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: llava-mixlora {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["run", "-h"]])
def test_help_is_shown(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert "LLaVA" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"llava-mixlora {__version__}"


def test_console_script_prints_what_it_is_asked_for_alone():
    done = subprocess.run(
        [Path(sys.executable).with_name("llava-mixlora"), "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"llava-mixlora {__version__}\n"


shapes_alone = pytest.mark.skipif(
    not hasattr(transformers, "AttentionInterface"), reason="transformers 4.37 cannot run a step on shapes alone"
)


@shapes_alone
@pytest.mark.slow
def test_doctor_estimates_a_model_that_is_only_a_configuration(tmp_path, clip_folder, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320, **sizes}))
    words = ["doctor", "--estimate", str(tmp_path), "--vision-tower", str(clip_folder), "--sequence-length", "16"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for line in ("pool A", "routers", "projector", "activations at the peak", "ZeRO-3 + CPU offload"):
        assert line in shown
    assert main([*words, "--json", "--bits", "8"]) == 0
    only = json.loads(capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['parameters_trained']['pool A']:,}" in shown
    assert told["bytes_per_gpu"]["8"]["base"] < told["bytes_per_gpu"]["16"]["base"]
    assert only["bytes_per_gpu"] == {"8": told["bytes_per_gpu"]["8"]}


@shapes_alone
def test_doctor_names_bad_input_in_one_line(tmp_path, capsys):
    assert "/gone" in error_of(capsys, "doctor", "--estimate", "/gone")
    assert "batch_size=0" in error_of(capsys, "doctor", "--estimate", str(tmp_path), "--batch-size", "0")
