"""Arguments of upstream's programs that ask a model, with what the model's record knows better than their defaults.

They choose a conversation template by the name of the model's folder, or have one template for all models.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from ..adapters.adapter_record import read_record
from ..adapters.its_llava import check_is_its_llava
from ..adapters.model_choices import AS_NAMED, ModelChoices
from .conversation import conversation_of
from .model_flags import add_model_flags, choices_of

MODEL_PATH, TEMPLATE, NAME = "--model-path", "--conv-mode", "--model-name"
LMMS_EVAL, LMMS_MODEL = "lmms_eval", "--model_args"
NAME_OF_TEMPLATE = {
    "llava_llama_2": "llama-2",
    "mistral_instruct": "mistral",
    "chatml_direct": "v1.6-34b",
    "mpt": "mpt",
    "v1": "v1",
    "vicuna_v1": "v1",
    "llava_v1": "v1",
}
"""What a model's name has to hold for `llava.serve.gradio_web_server` to choose (the like of) a template."""


def program_arguments(program: Path, arguments: Sequence[str]) -> tuple[list[str], ModelChoices]:
    """A program's arguments, without what they say to the plugin, and that.

    Args:
        program: the file that is run.
        arguments: as they were typed.

    Raises:
        MixLoraError: the model's record cannot be read.
    """
    arguments = list(arguments)
    flags = _flags_of(program)
    asks = MODEL_PATH in flags
    is_lmms_eval = program.parent.name == LMMS_EVAL
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_model_flags(ours)
    if not asks and not is_lmms_eval:
        return arguments, AS_NAMED
    said, arguments = ours.parse_known_args(arguments)
    choices = choices_of(said)
    if is_lmms_eval:
        return _of_lmms_eval(arguments), choices
    theirs = argparse.ArgumentParser(add_help=False)
    for flag in sorted(flags & {MODEL_PATH, TEMPLATE, NAME}):
        theirs.add_argument(flag)
    for flag in sorted(flags & {"--model-base", "--model-id"}):  # so that no abbreviation is taken for another flag
        theirs.add_argument(flag)
    given, _ = theirs.parse_known_args(arguments)
    if given.model_path is not None:
        check_is_its_llava(given.model_path)
        if TEMPLATE in flags:
            arguments += _template(given.model_path, given.conv_mode)
        elif NAME in flags and given.model_name is None:
            arguments += _name(given.model_path)
    return arguments, choices


def _template(model_path: str, said: str | None) -> list[str]:
    chosen = conversation_of(model_path, said, TEMPLATE, otherwise="")
    return [TEMPLATE, chosen] if said is None and chosen else []


def _name(model_path: str) -> list[str]:
    """A name by which upstream's page, which sees nothing else of a model, talks to it as in training."""
    record = read_record(model_path)
    part = None if record is None else NAME_OF_TEMPLATE.get(record.conversation)
    name = "_".join(Path(model_path).parts[-2:]) if _is_checkpoint(model_path) else Path(model_path).name
    if part is None or ("llava" in name.lower() and part in name.lower()):
        return []
    chosen = f"llava-{part}-{name}"
    print(f"note: served as {chosen}, so that LLaVA's page takes the template of its training; {NAME} for another name")
    return [NAME, chosen]


def _is_checkpoint(model_path: str) -> bool:
    return Path(model_path).name.startswith("checkpoint-")


def _of_lmms_eval(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(LMMS_MODEL)
    parser.add_argument("--model")
    given, rest = parser.parse_known_args(arguments)
    options = dict(part.partition("=")[::2] for part in (given.model_args or "").split(",") if part)
    if given.model != "llava" or "pretrained" not in options:
        return arguments
    said = options.get("conv_template")
    chosen = conversation_of(options["pretrained"], said, f"{LMMS_MODEL} conv_template=", otherwise="")
    if said is not None or not chosen:
        return arguments
    return ["--model", given.model, LMMS_MODEL, f"{given.model_args},conv_template={chosen}", *rest]


def _flags_of(program: Path) -> set[str]:
    """The flags that a file declares to argparse."""
    try:
        tree = ast.parse(program.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):  # running it will say so
        return set()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    declared = (call for call in calls if getattr(call.func, "attr", None) == "add_argument")
    return {word.value for call in declared for word in call.args if isinstance(word, ast.Constant)}
