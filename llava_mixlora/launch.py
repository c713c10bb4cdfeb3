"""`llava-mixlora run`: any upstream LLaVA entry point, unchanged, with the plugin active."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

from . import interruption, patches
from .adapters.adapter_folder import is_mixlora_adapter
from .errors import MixLoraError
from .import_failures import failure_of, first_cause, noted, told_in_one_line
from .inference.program_arguments import program_arguments
from .limits import FLAG, raise_limits
from .llava_package import file_of, llavas_beside, look_here, package_of_program, use, used
from .llava_version import hidden_copies, of_copies, origin
from .serving.upstreams_page import check_gradio

SERVERS = ("llava.serve.controller", "llava.serve.model_worker")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Describe the command `run` to its parser; its words are read by [`run_words`]."""
    parser.usage = f"llava-mixlora run [-h] [{FLAG} NAME=NUMBER] (-m MODULE | SCRIPT.py) [ARGS ...]"
    parser.description = (
        "Run a LLaVA entry point, unchanged, with the plugin active. Under a launcher: "
        "deepspeed --module llava_mixlora run ..., torchrun -m llava_mixlora run ..."
    )
    parser.epilog = "example: llava-mixlora run -m llava.serve.cli --model-path OUT --image-file IMG --device cpu"


def run_words(launcher_flags: list[str], words: list[str]) -> None:
    """Run what the words of the command line name, with what a launcher has put before them.

    Raises:
        MixLoraError: they name nothing to run, or as [`run`].
    """
    while words[:1] == [FLAG] and len(words) > 1:
        raise_limits([words[1]])
        words = words[2:]
    as_module = words[:1] == ["-m"]
    words = words[1:] if as_module else words
    if not words:
        raise MixLoraError("run: nothing to run; expected -m MODULE or SCRIPT.py, such as -m llava.train.train_mem")
    run(words[0], launcher_flags + words[1:], as_module)


def run(target: str, arguments: list[str], as_module: bool) -> None:
    """Apply the patches, then run `python -m target` or `python target` in this process.

    Args:
        target: a module name (with `as_module`) or the path of a script.
        arguments: the target's `sys.argv[1:]`.

    Raises:
        MixLoraError: there is no such module or script, a patch does not fit the installed LLaVA, or that fails itself:
            a module of it cannot be imported, its loader raises, or a name that it uses is defined nowhere.
    """
    if as_module:
        look_here()
        _check_installed(target)  # before the seconds that patching takes
    file = file_of(target) if as_module else _script_file(target)
    if file is not None:
        use(package_of_program(file, target if as_module else None))
    _tell_of_copies(used().name)
    with noted(used()), told_in_one_line():
        patches.apply()
        path = _module_file(target) if as_module else file
        patches.apply(_patched_program(path))
        _check_merge_script(path, arguments)
        arguments, choices = program_arguments(path, arguments)
        patches.llava_builder.choices_of_the_program.set(choices)
        sys.argv = [str(path), *arguments]
        if not as_module:
            sys.path.insert(0, str(path.parent))
        patched = _patched_module(path)
        with interruption.raising():
            if patched is not None:
                run_main_block(patched)
            elif as_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(path), run_name="__main__")


def _tell_of_copies(package: str) -> None:
    hidden = hidden_copies(package)
    if hidden and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {package}, {origin(package)}, {of_copies(package, hidden)}", file=sys.stderr, flush=True)


def run_main_block(module: ModuleType) -> None:
    """Execute what `module` does under `if __name__ == "__main__":`, in the namespace it was imported into.

    `runpy` would execute a second, unpatched copy of the module.
    """
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"), module.__file__)
    tree.body = [statement for block in tree.body if _is_main_guard(block) for statement in block.body]
    exec(compile(tree, module.__file__, "exec"), module.__dict__)


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in (
        "__name__ == '__main__'",
        "'__main__' == __name__",
    )


def _patched_program(path: Path) -> str | None:
    for module in {patch.module: None for patch in patches.PATCHES if patch.program}:
        here = used().module(module)
        file = file_of(here) if here is not None else None
        if file is not None and file.resolve() == path.resolve():
            return module
    return None


def _patched_module(path: Path) -> ModuleType | None:
    for name in {place.partition(":")[0] for patch in patches.PATCHES if patch.applied for place in patch.places}:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).resolve() == path.resolve():
            return module
    return None


def _check_installed(name: str) -> None:
    check_gradio(name)
    package = name.partition(".")[0]
    if package == "lmms_eval" and importlib.util.find_spec(package) is None:
        raise MixLoraError(f"-m {name}: lmms-eval is not installed here; run: pip install lmms-eval")
    for package in ("fastapi", "uvicorn") if name in SERVERS else ():
        if importlib.util.find_spec(package) is None:
            raise MixLoraError(f"-m {name}: {package} is not installed here; run: pip install 'llava-mixlora[serve]'")


def _check_merge_script(path: Path, arguments: list[str]) -> None:
    # It would save the adapter alone, since load_pretrained_model keeps that apart from its base.
    if path.name != "merge_lora_weights.py":
        return
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--model-path", "--model-base", "--save-model-path"):
        parser.add_argument(flag)
    given, _ = parser.parse_known_args(arguments)
    if given.model_path and is_mixlora_adapter(given.model_path):
        words = [f"--model-base {given.model_base}"] if given.model_base else []
        words += [f"--save-model-path {given.save_model_path or 'OUT'}"]
        raise MixLoraError(
            f"--model-path {given.model_path} is a MixLoRA adapter, which {path.name} cannot merge; run: "
            f"llava-mixlora merge --model-path {given.model_path} {' '.join(words)}"
        )


def _module_file(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except Exception as error:  # what it lies in is imported, and can fail in any way
        if file_of(name) is not None:
            raise MixLoraError(f"-m {name}: {failure_of(error) or first_cause(error, used())}") from error
        spec = None
    if spec is None or spec.origin is None:
        others = [one for one in llavas_beside() if one != name.partition(".")[0]]
        there = f"; {', '.join(others)} can be, here" if others else ""
        raise MixLoraError(
            f"-m {name}: no such module; expected an importable one, such as llava.train.train_mem{there}"
        )
    return Path(spec.origin)


def _script_file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise MixLoraError(f"{name}: no such script; expected a Python file, or -m and a module name")
    return path
