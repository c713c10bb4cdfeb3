"""The flag `--package`: which LLaVA a command is about, where nothing else says it."""

from __future__ import annotations

import argparse

from ..llava_package import look_here, named_package, use


def add_package(parser: argparse.ArgumentParser) -> None:
    """Describe the flag to a command's parser."""
    parser.add_argument(
        "--package",
        metavar="NAME",
        help="the LLaVA that will be run, by its package or by a module, as `run -m` is given (default: llava, or the "
        "only one that is there)",
    )


def use_package(given: argparse.Namespace) -> None:
    """Use the LLaVA that a command line names, found as `run -m` finds it.

    Raises:
        MixLoraError: there is none of that name.
    """
    look_here()
    use(named_package(given.package))
