"""What was trained beside an adapter: nothing but what a run of LLaVA leaves there is taken, and all of that needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..method.stored_tensors import FLOATS, Form, check_complete, check_form, check_known, forms_of
from .adapter_folder import INPUT_EMBEDDINGS
from .llava_config import projector_shapes

PROJECTOR = "model.mm_projector."
EMBEDDINGS = (INPUT_EMBEDDINGS, "lm_head.weight")
BESIDE = re.compile(
    r"model\.(mm_projector|vision_tower|vision_resampler|image_newline|mask_token)(\..+)?|"
    r"(.+\.)?\w*norm\w*\.weight|.+\.bias"
)
"""What is trained beside an adapter; embeddings and head have to have new rows, too."""


def check_trained_beside(
    beside: Mapping[str, Tensor],
    place: Path,
    llava: Mapping[str, Any] | None,
    of_base: Mapping[str, Any] | None,
    is_of_training: bool,
    is_of_the_authors: bool,
) -> None:
    """Refuse tensors that no run trains beside an adapter, and a projector that does not fit or is not there.

    Args:
        beside: the tensors by their names in the bare LLaVA.
        place: their file, for the message.
        llava: the adapter's `config.json`; without one nothing is known of a projector.
        of_base: that of the model that it is to be loaded on, where it is known.
        is_of_training: LLaVA's training wrote the adapter, which trains the projector, unless that is frozen, and saves
            it; who trains in Python may have left it as it is in the base.
        is_of_the_authors: the authors' training changes embeddings and head too.

    Raises:
        MixLoraError: names the tensors, and what is wrong with them.
    """
    found, config = forms_of(beside), llava or {}
    strange = [name for name in found if not BESIDE.fullmatch(name) and name not in EMBEDDINGS]
    check_known(found, place, strange)
    for name, form in found.items():
        check_form(name, form, (None,) * len(form.shape), FLOATS, place)
    if not is_of_the_authors:
        _check_embeddings(found, of_base, place)
    wanted = projector_shapes(config)
    of_projector = {name.removeprefix(PROJECTOR): form for name, form in found.items() if name.startswith(PROJECTOR)}
    base_has_none = of_base is not None and projector_shapes(of_base) == {}
    is_left_to_base = not base_has_none and (config.get("freeze_mm_mlp_adapter") or not is_of_training)
    if llava is None or wanted == {} or (is_left_to_base and not of_projector):
        return
    if wanted is None:  # of a fork, whose form is not known here
        check_complete([] if of_projector else [f"{PROJECTOR}*"], len(found) + 1, place)
        return
    for name, form in of_projector.items():
        if name in wanted:
            check_form(f"{PROJECTOR}{name}", form, wanted[name], FLOATS, place)
    check_known(found, place, [f"{PROJECTOR}{name}" for name in of_projector if name not in wanted])
    missing = [f"{PROJECTOR}{name}" for name in wanted if name not in of_projector]
    check_complete(missing, len(found) + len(missing), place)


def _check_embeddings(found: Mapping[str, Form], of_base: Mapping[str, Any] | None, place: Path) -> None:
    """Refuse embeddings and a head where training has given the vocabulary no tokens that the base lacks."""
    there = [name for name in EMBEDDINGS if name in found]
    words = (of_base or {}).get("vocab_size")
    if there and words is not None:
        check_known(found, place, [name for name in there if found[name].shape[:1] == (words,)])
