"""Running other programs' entry points in this process."""

import sys
import types

import pytest

from llava_mixlora import MixLoraError
from llava_mixlora.launch import run, run_main_block


@pytest.fixture(autouse=True)
def untouched(monkeypatch, patched):
    """run() belongs at the start of a process; here its changes must not outlive the test."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("order", ["{name} == {main}", "{main} == {name}"])
def test_main_block_runs_in_the_imported_module(tmp_path, quote, order):
    guard = order.format(name="__name__", main=f"{quote}__main__{quote}")
    path = tmp_path / "entry.py"
    path.write_text(f"value = 1\nif {guard}:\n    result = function(value)\n    second = result + 1\n")
    module = types.ModuleType("entry")
    module.__file__ = str(path)
    module.value, module.function = 20, lambda value: value + 1
    run_main_block(module)
    assert (module.value, module.result, module.second) == (20, 21, 22)


def test_module_is_run_as_main_with_its_arguments(tmp_path):
    (tmp_path / "entry_of_launch.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(__name__ + sys.argv[0])\n"
    )
    sys.path.insert(0, str(tmp_path))
    run("entry_of_launch", [str(tmp_path / "seen")], as_module=True)
    assert (tmp_path / "seen").read_text() == "__main__" + str(tmp_path / "entry_of_launch.py")


def test_package_is_run_by_its_main_module(tmp_path):
    package = tmp_path / "package_of_launch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(__package__)\n")
    sys.path.insert(0, str(tmp_path))
    run("package_of_launch", [str(tmp_path / "seen")], as_module=True)
    assert (tmp_path / "seen").read_text() == "package_of_launch"


def test_script_of_a_patched_module_runs_the_patched_one(monkeypatch):
    from llava.train import train

    calls = []
    monkeypatch.setattr(train, "train", lambda: calls.append(sys.argv))
    run(train.__file__, ["--flag"], as_module=False)
    run("llava.train.train", [], as_module=True)
    assert calls == [[train.__file__, "--flag"], [train.__file__]]


@pytest.mark.parametrize("name", ["no_such_module", "llava.no_such", "llava.train"])
def test_module_that_cannot_be_run_is_named(name):
    with pytest.raises(MixLoraError, match=f"-m {name}: no such module"):
        run(name, [], as_module=True)


def test_harness_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MixLoraError, match="^-m lmms_eval: .* not installed here; run: pip install lmms-eval$"):
        run("lmms_eval", ["--model", "llava"], as_module=True)


@pytest.mark.parametrize("program", ["controller", "model_worker"])
def test_server_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, program):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MixLoraError, match=f"^-m llava.serve.{program}: uvicorn is not .*'llava-mixlora.serve.'$"):
        run(f"llava.serve.{program}", [], as_module=True)


@pytest.mark.parametrize("name", ["gone.py", "."])
def test_script_that_is_not_there_is_named(name):
    with pytest.raises(MixLoraError, match="no such script"):
        run(name, [], as_module=False)
