"""The console script `llava-mixlora`, also `python -m llava_mixlora`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from . import __version__
from .errors import MixLoraError

# deepspeed and torch's old launcher put the rank right behind the program: before our subcommand, not the script.
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    launcher_flags = []
    while argv and LOCAL_RANK.fullmatch(argv[0]):
        launcher_flags.append(argv.pop(0))
    try:
        if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
            return _run(launcher_flags, argv[1:])  # argparse would take the script's flags for ours
        _parser().parse_args(argv)
        return 0
    except MixLoraError as error:
        print(f"llava-mixlora: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-mixlora", description="MixLoRA for the LLaVA that is installed here.")
    parser.add_argument("--version", action="version", version=f"llava-mixlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser(
        "run",
        help="run a LLaVA entry point with the plugin active",
        usage="llava-mixlora run [-h] (-m MODULE | SCRIPT.py) [ARGS ...]",
        description="Run a LLaVA entry point, unchanged, with the plugin active. Under a launcher: "
        "deepspeed --module llava_mixlora run ..., torchrun -m llava_mixlora run ...",
        epilog="example: llava-mixlora run -m llava.serve.cli --model-path OUT --image-file IMG --device cpu",
    )
    return parser


def _run(launcher_flags: list[str], words: list[str]) -> int:
    as_module = words[:1] == ["-m"]
    words = words[1:] if as_module else words
    if not words:
        raise MixLoraError("run: nothing to run; expected -m MODULE or SCRIPT.py, such as -m llava.train.train_mem")
    from .launch import run  # importing LLaVA's stack takes seconds that --help need not wait for

    run(words[0], launcher_flags + words[1:], as_module)
    return 0
