"""The flags on a run's command line, before upstream parses them: what was given at all, and with which word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers.hf_argparser import string_to_bool

TRUE = "True"


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """The word given to each flag, by the flag's name with underscores; of a flag given twice, the last one.

    A flag without a word is a switch turned on, `"True"`; of a flag with several words, the first is told.
    """
    given: dict[str, str] = {}
    for position, word in enumerate(argv):
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        given[name.replace("-", "_")] = value if equals else TRUE if following.startswith("--") else following
    return given


def is_true(given: Mapping[str, str], flag: str) -> bool:
    """Whether a flag of yes or no is given, and turned on; False for a word that is neither (upstream refuses it)."""
    try:
        return bool(string_to_bool(given.get(flag, "False")))
    except Exception:  # argparse.ArgumentTypeError, or what its parser makes of it
        return False


def trains_adapter(given: Mapping[str, str]) -> bool:
    """Whether the run trains a MixLoRA or LoRA adapter, rather than a projector or the whole model."""
    return is_true(given, "mixlora_enable") or is_true(given, "lora_enable")
