"""An adapter of upstream's LLaVA for transformers' own, or the other way round: what makes it fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_OF_UPSTREAM, _OF_TRANSFORMERS = re.compile(r"\bmodel\\?\.layers\b"), re.compile(r"\blanguage_model\\?\.layers\b")


def says_of_names(names: Iterable[str], model: str, is_native: bool) -> str | None:
    """What is wrong, and what to do, where layers are named as in the other of the two LLaVAs; None where they are not.

    Args:
        names: of an adapter's tensors, or what its `target_modules` say.
        model: what the message calls the model.
        is_native: whether it is transformers' own.
    """
    other = _OF_UPSTREAM if is_native else _OF_TRANSFORMERS
    if not any(other.search(name) for name in names):
        return None
    if is_native:
        return (
            f"it names its layers as upstream's LLaVA does, and {model} is transformers' own: llava-mixlora export-hf "
            "--model-path ADAPTER --save-model-path OUT writes one that fits, with its base and projector"
        )
    return (
        f"it names its layers as transformers' own LLaVA does, and {model} is upstream's, or a bare language model: "
        "llava-mixlora import-hf --model-path ADAPTER --model-base LLAVA --save-model-path OUT writes one that fits"
    )


def says_of(names: Iterable[str], model: str, modules: Collection[str]) -> str | None:
    """As [`says_of_names`], of a model in memory with these modules; None too where it is neither of the two."""
    is_native = "model.language_model.layers" in modules and "model.multi_modal_projector" in modules
    return says_of_names(names, model, is_native) if is_native or "model.layers" in modules else None
