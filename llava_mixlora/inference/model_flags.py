"""Flags of every command that loads a model, beside those that name it."""

from __future__ import annotations

import argparse

from ..adapters.model_choices import ModelChoices
from ..inputs import add_allow_incomplete


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--vision-tower`, `--allow-other-base` and `--allow-incomplete`."""
    parser.add_argument("--vision-tower", metavar="PATH", help="its vision tower (default: the one that it names)")
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="take a base or vision tower that is not the one of its training",
    )
    add_allow_incomplete(parser)


def choices_of(given: argparse.Namespace) -> ModelChoices:
    """What the flags of [`add_model_flags`] say."""
    return ModelChoices(given.vision_tower, given.allow_other_base, given.allow_incomplete)
