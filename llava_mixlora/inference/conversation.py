"""The conversation template that a model is asked with: that of its training, where nobody says another."""

from __future__ import annotations

from pathlib import Path

from ..adapters.adapter_record import RECORD, read_record
from ..adapters.its_llava import use_its_llava
from ..errors import MixLoraError
from ..llava_package import part

SAME = {"vicuna_v1": "v1"}
"""Templates that upstream has under two names."""


def conversation_of(model_path: str | Path, said: str | None, flag: str, otherwise: str) -> str:
    """The template to ask a model with, by its name in `llava.conversation.conv_templates`.

    One line is printed where the user says another than the model was trained with.

    Args:
        model_path: folder of the adapter or model, or a hub name.
        said: what the user says; None for nothing.
        flag: how the user says it.
        otherwise: the template where the model has no record.

    Raises:
        MixLoraError: the record is damaged, or names a template that LLaVA does not have.
    """
    record = read_record(model_path)
    recorded = None if record is None else record.conversation
    if said is None:
        return otherwise if recorded is None else _known(recorded, model_path, flag)
    if recorded is not None and SAME.get(said, said) != SAME.get(recorded, recorded):
        print(f"note: {flag} {said}: {model_path} was trained with {recorded}; {said} is used, as you say", flush=True)
    return said


def _known(recorded: str, model_path: str | Path, flag: str) -> str:
    from .. import patches

    use_its_llava(model_path)
    patches.apply()  # without them LLaVA cannot be imported
    conv_templates = part("llava.conversation:conv_templates")
    if recorded not in conv_templates:
        raise MixLoraError(
            f"{model_path}: its {RECORD} names the conversation template {recorded[:100]!r}, which LLaVA does not "
            f"have; say another with {flag}, one of {', '.join(conv_templates)}"
        )
    return recorded
