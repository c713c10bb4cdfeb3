"""The models that a server has, by the names that requests say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.adapter_folder import is_adapter
from ..adapters.its_llava import use_its_llava
from ..adapters.model_choices import ModelChoices
from ..adapters.model_places import adapter_of
from ..errors import MixLoraError
from ..evaluation.answering import check_conversation
from ..inference.conversation import conversation_of
from ..inference.loading import load_for_inference
from ..inputs import check_model_path
from ..merging.stand_in import TEMPLATE
from ..method.config import MixLoraConfig
from ..method.model import ADAPTER, BASE_MODEL
from .in_process import Served
from .prompts import Prompts


@dataclass(frozen=True)
class NamedModel:
    """A model that is served, and the name that requests say."""

    name: str
    path: str


def named_models(words: Sequence[str]) -> list[NamedModel]:
    """What MODEL and NAME=MODEL say.

    Raises:
        MixLoraError: two have one name, or one is nowhere.
    """
    found: dict[str, NamedModel] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or os.path.exists(word):
            name, path = Path(word.rstrip("/")).name, word
        check_model_path("MODEL", path)
        if not name or name in found:
            raise MixLoraError(f"{word}: two models would be called {name!r}; say NAME=MODEL to name them")
        found[name] = NamedModel(name, path)
    return list(found.values())


def load_served(
    models: Sequence[NamedModel], model_base: str | None, bits: int, version: str | None, choices: ModelChoices
) -> Iterator[tuple[str, Served]]:
    """Load the models into this process; each by its name, and the base of each adapter."""
    from .. import patches

    for model in models:
        use_its_llava(adapter_of(model.path))
        patches.apply()  # templates are LLaVA's
        conversation = conversation_of(adapter_of(model.path), version, "--version", otherwise=TEMPLATE)
        check_conversation(conversation, "--version")
        base = model_base if is_adapter(adapter_of(model.path)) else None
        prompts = Prompts(load_for_inference(model.path, base, bits, choices=choices), conversation)
        peft = getattr(prompts.loaded[1], "peft_config", None)
        about = {"conversation": conversation}
        if not peft:
            yield model.name, Served(prompts, None, about)
            continue
        of_base = f"{model.name}:base"
        yield model.name, Served(prompts, ADAPTER, {**about, **_factors(peft[ADAPTER]), "parent": of_base})
        yield of_base, Served(prompts, BASE_MODEL, about)


def _factors(config: Any) -> dict[str, Any]:
    """What `/v1/models` tells of an adapter's routes; nothing of one that has none."""
    if not isinstance(config, MixLoraConfig):
        return {}
    return {"mixlora": {"num_factors": config.num_factors, "r": config.r, "pairing": config.pairing}}
