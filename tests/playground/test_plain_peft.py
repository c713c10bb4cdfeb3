"""`playground.plain_peft`: the example runs as its docstring says, and learns its tasks."""

import json
import re
import runpy
import subprocess
import sys

import pytest

MODULE = "playground.plain_peft"
ROW = r"^(\w{4}) ([\d.]+)% (\[.*\])$"


@pytest.mark.slow
def test_example_learns_its_tasks_and_loads_what_it_saved(tmp_path):
    done = subprocess.run([sys.executable, "-m", MODULE, "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(ROW, done.stdout, re.MULTILINE)
    assert [task for task, _, _ in rows] == ["copy", "flip", "sort", "next"]
    for task, accuracy, chosen in rows:
        # The lowest of ten seeds is 87.4 %; one guess at three digits is right in 0.1 %.
        assert float(accuracy) > 70, task
        assert len(json.loads(chosen)) == 16 and sum(json.loads(chosen)) == 4 * 143, task
    assert "logits equal after loading: True" in done.stdout.splitlines()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MIXLORA"


def test_example_refuses_to_train_for_no_steps(tmp_path, monkeypatch, capsys):
    output = tmp_path / "adapter"
    monkeypatch.setattr(sys, "argv", [MODULE, "--steps", "0", "--output", str(output)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(MODULE, run_name="__main__")
    assert stopped.value.code == 2 and "--steps=0: expected at least 1" in capsys.readouterr().err
    assert not output.exists()
