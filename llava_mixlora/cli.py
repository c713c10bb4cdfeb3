"""The console script `llava-mixlora`, also `python -m llava_mixlora`: a list of commands, each at home elsewhere."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__, interruption
from .diagnosis.doctor import check_imported
from .errors import MixLoraError
from .limits import add_input_limit, raise_limits
from .writing import OF_WRITES, reason_of

COMMANDS = {
    "run": ("launch:add_run", "run a LLaVA entry point with the plugin active"),
    "check": ("diagnosis.check:add_check", "read training data as a run does: what is lost, repaired, cut off"),
    "convert": ("adapters.convert:add_convert", "turn a checkpoint of the authors' code into an adapter"),
    "inspect": (
        "adapters.inspect_adapter:add_inspect",
        "show what an adapter is and how its routers used the factors",
    ),
    "plot": ("analysis.plot:add_plot", "draw how an adapter's routers used the factors"),
    "doctor": ("diagnosis.doctor:add_doctor", "tell what works here, or how much memory a run will need"),
    "patches": ("diagnosis.patch_table:add_patches", "list what is changed in upstream programs at run time, and why"),
    "merge": ("merging.merge:add_merge", "merge an adapter into its base: one checkpoint that needs no plugin"),
    "export-lora": ("merging.merge:add_export_lora", "turn an adapter into a plain LoRA of PEFT"),
    "export-hf": ("native.export:add_export_hf", "write a LLaVA and its adapter as transformers' own LLaVA"),
    "import-hf": (
        "native.import_hf:add_import_hf",
        "turn an adapter of transformers' own LLaVA into one of upstream's",
    ),
    "serve": ("serving.serve:add_serve", "serve adapters and models over OpenAI's interface"),
    "eval": ("evaluation.evaluate:add_eval", "answer the questions of a benchmark, and score the answers"),
    "interference": (
        "analysis.interference:add_interference",
        "measure how much the tasks of a MixLoRA or LoRA adapter interfere",
    ),
}
"""By name, the function that describes a command to its parser, and the line on it in the list of all commands."""

# deepspeed and torch's old launcher put the rank right behind the program: before our subcommand, not the script.
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except MixLoraError as error:
        _say(f"error: {error}")
        return 1
    except OSError as error:
        if error.errno not in OF_WRITES:
            raise
        _drop_output()
        place = error.filename or "the standard output, or a file,"
        _say(f"error: {place} could not be written ({reason_of(error)})")
        return 1
    except KeyboardInterrupt as error:
        _end_bars()
        interruption.say(str(error))
        return interruption.STATUS


def _run(argv: list[str]) -> int:
    launcher_flags = []
    while argv and LOCAL_RANK.fullmatch(argv[0]):
        launcher_flags.append(argv.pop(0))
    name = argv[0] if argv and argv[0] in COMMANDS else None
    if name not in (None, "doctor"):
        check_imported()
    if name == "run" and argv[1:2] not in (["-h"], ["--help"]):
        from .launch import run_words

        run_words(launcher_flags, argv[1:])  # argparse would take the script's flags for ours
        return 0
    return _answer(_parser(name).parse_args(argv))


def _parser(name: str | None) -> argparse.ArgumentParser:
    """A parser of all commands' names, and of the arguments of the one that is called `name`."""
    parser = argparse.ArgumentParser(prog="llava-mixlora", description="MixLoRA for the LLaVA that is installed here.")
    parser.add_argument("--version", action="version", version=f"llava-mixlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, (place, summary) in COMMANDS.items():
        of_command = commands.add_parser(command, help=summary)
        if command == name:
            module, _, add_arguments = place.partition(":")
            getattr(import_module(f".{module}", __package__), add_arguments)(of_command)
            add_input_limit(of_command)
    return parser


def _answer(arguments: argparse.Namespace) -> int:
    """Run a command that prints; returns its status, or a shell's for a reader that went away, as `head` does."""
    try:
        raise_limits(arguments.input_limit)
        with interruption.raising():
            status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE


def _say(line: str) -> None:
    _end_bars()
    print(f"llava-mixlora: {line}", file=sys.stderr)


def _end_bars() -> None:
    """End the lines of progress bars that were left half way, or what is said next would stand behind one."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
