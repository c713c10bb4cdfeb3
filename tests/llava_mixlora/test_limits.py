"""How large what is read may be, and who may say otherwise."""

import subprocess
import sys

import pytest

from llava_mixlora import MixLoraConfig
from llava_mixlora.cli import main
from llava_mixlora.limits import NAMES, VARIABLE, Limits, limits, raise_limits

from ..tiny import message_of

pytestmark = pytest.mark.one_stack


@pytest.fixture(autouse=True)
def of_nobody(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_limits_are_changed_one_by_one(monkeypatch):
    monkeypatch.setenv(VARIABLE, "tasks=3")
    raise_limits(["image_pixels=7", "tasks=4"])
    assert (limits().image_pixels, limits().tasks) == (7, 4)
    assert limits().json_bytes == Limits().json_bytes


def test_processes_that_are_started_obey(monkeypatch):
    monkeypatch.setenv(VARIABLE, "tasks=3")
    raise_limits(["prompt_letters=12"])
    program = "from llava_mixlora.limits import limits; print(limits().prompt_letters, limits().tasks)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split() == ["12", "3"]


@pytest.mark.parametrize("word", ["pixels=3", "tasks", "tasks=", "tasks=0", "tasks=-1", "tasks=1.5", "tasks=²", "=4"])
def test_other_words_are_refused_with_the_names(word):
    message = message_of(raise_limits, [word])
    assert repr(word) in message and all(name in message for name in NAMES)
    assert limits() == Limits()


def test_damaged_variable_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(VARIABLE, "everything")
    assert main(["inspect", str(tmp_path)]) == 1
    assert VARIABLE in capsys.readouterr().err


def test_message_tells_the_flag_that_allows_more(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(VARIABLE, "")  # is put back when the test ends
    assert "--input-limit num_factors=NUMBER" in message_of(MixLoraConfig, num_factors=5000)
    assert main(["inspect", "--input-limit", "num_factors=5000", str(tmp_path)]) == 1
    assert MixLoraConfig(num_factors=5000, r=4).num_factors == 5000


def test_run_takes_it_before_what_it_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(VARIABLE, "")
    (tmp_path / "program.py").write_text("from llava_mixlora.limits import limits\nprint('LIMIT', limits().tasks)\n")
    assert main(["run", "--input-limit", "tasks=5", str(tmp_path / "program.py")]) == 0
    assert "LIMIT 5" in capsys.readouterr().out
