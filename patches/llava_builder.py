"""`llava.model.builder`: adapters that stay adapters (a plain LoRA with `keep_adapter`), models that answer batches.

And models that load whatever their folder is called, and where flash attention is asked for and cannot be had.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from llava_mixlora.adapters.adapter_folder import (
    INPUT_EMBEDDINGS,
    is_adapter,
)
from llava_mixlora.adapters.adapter_record import RECORD, read_record
from llava_mixlora.adapters.base_check import check_base, check_tower
from llava_mixlora.adapters.config_file import config_of
from llava_mixlora.adapters.its_llava import check_is_its_llava
from llava_mixlora.adapters.linked_base import linked_base
from llava_mixlora.adapters.llava_config import check_is_no_native, check_names_no_code, llava_config
from llava_mixlora.adapters.loader_branch import Branch, branch_of
from llava_mixlora.adapters.loader_names import loader_name
from llava_mixlora.adapters.model_choices import AS_NAMED, ModelChoices
from llava_mixlora.adapters.model_places import adapter_of, base_model_of, vision_tower_of
from llava_mixlora.adapters.pickles import TensorsOnly
from llava_mixlora.adapters.reading import Adapter, check_is_of_upstream, read
from llava_mixlora.adapters.stored_weights import check_folder_is_no_wrapped_model
from llava_mixlora.attention import FLASH, available_attention
from llava_mixlora.data.picture_size import take_size_of
from llava_mixlora.errors import MixLoraError
from llava_mixlora.llava_package import used
from llava_mixlora.method.stored_tensors import allowing_incomplete

from ..adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL
from .patch import FAULT, METHOD, Patch

ATTENTION = "attn_implementation"
OURS = ("keep_adapter", "choices")
"""What `load_pretrained_model` takes here, and no LLaVA's own does."""
OUTSIDE = re.compile(NOT_THE_LANGUAGE_MODEL)
Loaded = tuple[Any, Any, Any, int]  # tokenizer, model, image processor, context length


choices_of_the_program: ContextVar[ModelChoices] = ContextVar("of the program that is run", default=AS_NAMED)
"""Hold for calls that say nothing else: upstream's programs have no flags for them."""


def _load_mixlora(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(
        model_path: str,
        model_base: str | None,
        model_name: str,
        *args: Any,
        keep_adapter: bool = False,
        choices: ModelChoices | None = None,
        **kwargs: Any,
    ) -> Loaded:
        chosen = choices or choices_of_the_program.get()
        model_path = adapter_of(model_path)
        # Where there is an adapter, upstream takes what lies beside it at its word, code included.
        if not is_adapter(model_path):
            check_names_no_code(model_path)
            check_is_no_native(model_path)
            check_folder_is_no_wrapped_model(model_path)
            config = None if model_base else _with_its_tower(original, model_path, chosen)
            if config is None:
                return original(model_path, model_base, model_name, *args, **kwargs)
            return _load_whole(original, model_path, config, model_name, *args, **kwargs)
        with allowing_incomplete(chosen.allow_incomplete):
            return _load_adapter(original, model_path, model_base, chosen, keep_adapter, *args, **kwargs)

    return load_pretrained_model


def _load_adapter(
    original: Callable[..., Loaded],
    model_path: str,
    model_base: str | None,
    chosen: ModelChoices,
    keep_adapter: bool,
    *args: Any,
    **kwargs: Any,
) -> Loaded:
    check_is_its_llava(model_path)
    base = base_model_of(model_path, model_base)
    check_folder_is_no_wrapped_model(base)
    if read_record(model_path) is None:
        print(
            f"note: {model_path} has no {RECORD} (an earlier version made it, or LLaVA alone), so whether base, "
            "vision tower and conversation template are those of its training is not checked",
            flush=True,
        )
    check_base(model_path, base, chosen.allow_other_base)
    adapter = read(model_path, base, to_load=True)
    check_is_of_upstream(adapter)
    config = llava_config(model_path)
    if getattr(config, "mm_vision_tower", None) is not None:
        config.mm_vision_tower = vision_tower_of(model_path, config.mm_vision_tower, chosen.vision_tower, base)
        check_tower(model_path, config.mm_vision_tower, chosen.allow_other_base)
    # Upstream loads the base as a complete LLaVA, with the configuration that training wrote (a bare Vicuna does
    # not know of a vision tower); then come the projector and the adapter. Its own LoRA branch would merge.
    name = "llava-mistral" if config.model_type == "llava_mistral" else "llava"  # chooses the class
    has_more_tokens = INPUT_EMBEDDINGS in adapter.beside
    load = functools.partial(_load_whole, original)
    load = _with_more_tokens(load, model_path, adapter.beside) if has_more_tokens else load
    loaded = load(base, config, name, *args, **kwargs)
    tokenizer, model, image_processor, context_length = loaded
    _load_beside(model, adapter)
    adapted = _with_adapter(model, adapter)
    if not adapter.is_mixlora and not keep_adapter:
        adapted = adapted.merge_and_unload()
    return tokenizer, adapted, image_processor, context_length


def _with_its_tower(loader: Callable[..., Loaded], model_path: str, choices: ModelChoices) -> Any:
    """The configuration that a whole LLaVA is loaded with, so that its vision tower is found; None: its own."""
    from transformers import AutoConfig

    recorded = (config_of(model_path) or {}).get("mm_vision_tower")
    if recorded is None:
        return None
    found = vision_tower_of(model_path, recorded, choices.vision_tower)
    check_tower(model_path, found, choices.allow_other_base)
    branch = _branch(loader, (config_of(model_path) or {}).get("model_type"))
    # A loader that reads the configuration itself may have to be told that the tower is not among the weights.
    if found == recorded and (branch is None or branch.takes_config):
        return None
    config = AutoConfig.from_pretrained(model_path)
    config.mm_vision_tower = found
    return config


def _load_whole(
    original: Callable[..., Loaded], folder: str, config: Any, model_name: str, *args: Any, **kwargs: Any
) -> Loaded:
    """Load a whole LLaVA with another configuration than its folder's."""
    model = used().language_model(config.model_type)
    branch = None if model is None else branch_of(original, model[0].name)
    if branch is None or branch.takes_config:
        return original(folder, None, branch.name if branch else model_name, *args, **{**kwargs, "config": config})
    with linked_base(folder, {**config.to_dict(), "model_type": model[1]}) as place:
        loaded = original(str(place), None, branch.name, *args, **kwargs)
    for part in loaded[:2]:  # they name the place that they come from in what they save
        part.name_or_path = folder
    loaded[1].config.name_or_path = folder
    return loaded


def _with_more_tokens(
    original: Callable[..., Loaded], model_path: str, trained_beside: dict[str, Any]
) -> Callable[..., Loaded]:
    """Load a base that has fewer tokens than its adapter's configuration says, and make room for the rest."""

    def load_pretrained_model(base: str, config: Any, *args: Any, **kwargs: Any) -> Loaded:
        from transformers import AutoTokenizer

        of_adapter, of_base = copy.deepcopy(config), config_of(base) or {}
        config.vocab_size = of_base.get("vocab_size", config.vocab_size)
        config.pad_token_id = of_base.get("pad_token_id")  # Trainer names one of the new tokens there
        config.mm_use_im_patch_token = config.mm_use_im_start_end = False  # upstream would number these tokens anew
        base_tokenizer, model, image_processor, context_length = original(base, config, *args, **kwargs)
        # All rows are about to be loaded, so none needs the mean of the others, which takes a minute at 7B.
        takes_mean = "mean_resizing" in inspect.signature(model.resize_token_embeddings).parameters
        options = {"mean_resizing": False} if takes_mean else {}
        model.resize_token_embeddings(len(trained_beside[INPUT_EMBEDDINGS]), **options)
        for name in ("pad_token_id", "mm_use_im_patch_token", "mm_use_im_start_end"):
            setattr(model.config, name, getattr(of_adapter, name, None))
        is_fast = of_adapter.model_type == "llava_mistral"  # as upstream chooses
        tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=is_fast)
        tokenizer.padding_side = base_tokenizer.padding_side
        return tokenizer, model, image_processor, context_length

    return load_pretrained_model


def _load_beside(model: Any, adapter: Adapter) -> None:
    ours = dict(model.state_dict())
    for name, tensor in adapter.beside.items():
        has = ours.get(name)
        if has is None or (has.is_floating_point() and has.shape != tensor.shape):  # quantized ones have their own
            here = "this model does not have" if has is None else f"is {list(has.shape)} in this model"
            raise MixLoraError(
                f"{adapter.folder} holds {name} of shape {list(tensor.shape)}, which {here}; pass the base that it was "
                "trained on as --model-base"
            )
    model.load_state_dict(adapter.beside, strict=False)


def _with_adapter(model: Any, adapter: Adapter) -> Any:
    from peft import PeftModel

    config = adapter.config
    if not adapter.is_mixlora and not isinstance(config.target_modules, str):
        # In upstream's LoRA runs the tower is loaded after the adapter. PEFT 0.13 knows no exclude_modules.
        names = "|".join(map(re.escape, sorted(config.target_modules)))  # the last parts of them, or all
        config.target_modules = rf"(?!{NOT_THE_LANGUAGE_MODEL})(.*\.)?({names})"
    elif adapter.is_mixlora and config.exclude_modules is None and not any(map(OUTSIDE.match, adapter.forms)):
        config.exclude_modules = NOT_THE_LANGUAGE_MODEL  # it was trained before its tower was loaded
    return PeftModel.from_pretrained(model, str(adapter.folder), config=config).eval()


def _pad_on_the_left(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        loaded = original(*args, **kwargs)
        loaded[1].config.tokenizer_padding_side = "left"  # where LLaVA pads a batch after it has put the images in
        return loaded

    return load_pretrained_model


def _pictures_of_the_towers_size(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        loaded = original(*args, **kwargs)
        if hasattr(loaded[1], "get_vision_tower"):
            take_size_of(loaded[1].get_vision_tower(), loaded[2])
        return loaded

    return load_pretrained_model


def _flash_attention_where_it_runs(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        # A parameter of some forks, in others one of the keywords that go on to the model's class.
        options = given.arguments if ATTENTION in given.arguments else given.arguments.get("kwargs", {})
        asked = FLASH if given.arguments.get("use_flash_attn") else options.get(ATTENTION)
        if asked is not None:
            if "use_flash_attn" in given.arguments:
                given.arguments["use_flash_attn"] = False
            device = "cuda" if torch.cuda.is_available() else "cpu"
            options[ATTENTION] = available_attention(asked, given.arguments.get("device", device))
        return original(*given.args, **given.kwargs, **ours)

    return load_pretrained_model


def _where_there_is_a_device(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    parameters = inspect.signature(original).parameters
    if "device" in parameters or "device_map" not in parameters:
        return original

    @functools.wraps(original)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Loaded:
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        given = inspect.signature(original).bind(*args, **kwargs)
        if "device_map" in given.arguments and not torch.cuda.is_available():
            given.arguments["device_map"] = "auto"
        return original(*given.args, **given.kwargs, **ours)

    return load_pretrained_model


def _by_model_type(original: Callable[..., Loaded]) -> Callable[..., Loaded]:
    @functools.wraps(original)
    def load_pretrained_model(
        model_path: str, model_base: str | None, model_name: str, *args: Any, **kwargs: Any
    ) -> Loaded:
        kind = (config_of(model_path) or {}).get("model_type")
        on_hub = not Path(model_path).is_dir()  # where the name alone tells an adapter from a projector
        has_adapter = "lora" in model_name.lower() and model_base is not None if on_hub else is_adapter(model_path)
        return original(model_path, model_base, _name_of(original, kind, has_adapter) or model_name, *args, **kwargs)

    return load_pretrained_model


def _branch(loader: Callable[..., Loaded], model_type: str | None) -> Branch | None:
    model = used().language_model(model_type)
    return None if model is None else branch_of(loader, model[0].name)


def _name_of(loader: Callable[..., Loaded], model_type: str | None, is_adapter: bool) -> str | None:
    branch = _branch(loader, model_type)
    if branch is None:
        return loader_name(model_type, is_adapter)
    return f"{branch.name}-lora" if is_adapter else branch.name


PATCHES = (
    Patch(
        "llava.model.builder:torch",
        kind=FAULT,
        why="torch.load runs the code that a file holds, before PyTorch 2.6 unless it is told not to",
        replace=TensorsOnly,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=METHOD,
        why="upstream merges every adapter into its base, and asks for the base even where the adapter names it",
        replace=_load_mixlora,
        parameters=("model_path", "model_base", "model_name"),
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="a loaded model keeps the padding side of its training, the right, and in a batch (as lmms-eval asks) "
        "generate() then goes on from the padding of shorter prompts (haotian-liu/LLaVA#754)",
        replace=_pad_on_the_left,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="some LLaVAs stretch the tower's positions to larger pictures, and leave its image processor as it was",
        replace=_pictures_of_the_towers_size,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="use_flash_attn, which model_worker has a flag for, fails where flash-attn is not installed or sees no GPU",
        replace=_flash_attention_where_it_runs,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="without a parameter for the device it moves the vision tower to a GPU, also where there is none, unless "
        "the device_map is auto",
        replace=_where_there_is_a_device,
    ),
    Patch(
        "llava.model.builder:load_pretrained_model",
        kind=FAULT,
        why="upstream takes a model for a LLaVA, of a Llama, a Mistral or an MPT, by its folder's name",
        replace=_by_model_type,
        parameters=("model_path", "model_base", "model_name"),
    ),
)
