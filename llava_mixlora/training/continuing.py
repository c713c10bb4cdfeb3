"""A new run that goes on from a trained adapter on other data: `--mixlora_init_from ADAPTER`.

Optimizer, schedule, steps and data are new. What a MixLoRA adapter has learnt goes on: factors, routers, W_AB, routing
statistics, the centre of router_input="words" (whose warm-up, once over, stays over) and the projector beside it. Of a
plain LoRA the projector and the base go on; its own weights are no pools.

What such a run is not told it takes from the adapter: as words on its command line ([`words_of_adapter`]), and as
fields of its configuration ([`continued_config`]). What it is told and cannot be is refused, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.adapter_folder import (
    NON_LORA_TRAINABLES,
    is_mixlora_adapter,
    read_config,
    read_fields,
    read_non_lora_trainables,
    weights_of,
)
from ..adapters.adapter_record import read_record
from ..adapters.fingerprints import fingerprint
from ..adapters.llava_config import read_llava_config
from ..adapters.model_places import base_model_of
from ..adapters.reading import read
from ..adapters.stored_weights import weight_files
from ..errors import MixLoraError
from ..inputs import expanded, read_json
from ..method.config import MixLoraConfig
from ..method.model import ADAPTER, MixLoraModel
from ..method.tensor_names import STATISTICS
from .checkpoint import CHECKSUMS, sha256_of, verify
from .given_flags import given_flags, is_true

INIT_FROM = "mixlora_init_from"
FREE = (
    *("lora_dropout", "router_gradient", "decode_routing", "unknown_prompt"),
    *("balance_loss_weight", "task_loss_weight"),
)
"""Fields of [`MixLoraConfig`] that a new run may choose: they change nothing of what the adapter does to an input."""
FLAG_OF_FIELD = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "bias": "lora_bias"}
"""Upstream's flags, whose defaults are values of their own; all others are `mixlora_` and the field."""
FLAG_OF_BIAS = {"mixlora_only": "lora_only"}
OF_THE_MODEL = {
    "vision_tower": "mm_vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_projector_type": "mm_projector_type",
    "mm_patch_merge_type": "mm_patch_merge_type",
    "mm_use_im_start_end": "mm_use_im_start_end",
    "mm_use_im_patch_token": "mm_use_im_patch_token",
}
"""Flags of what the projector and the layers were trained to see, and the names of their values in `config.json`."""
OF_THE_DATA = {"image_aspect_ratio": "image_aspect_ratio", "model_max_length": "tokenizer_model_max_length"}
"""Flags that a new run may choose anew."""
SHAPE_OF_A_BASE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
ENDS = 1 << 20  # bytes of a weight file, from its start and its end, by which two bases are compared


def words_of_adapter(argv: Sequence[str]) -> list[str]:
    """What a run that goes on from an adapter is not told and takes from it, as words of a command line.

    Empty without `--mixlora_init_from`. `argv`: the words of the run's command line.

    Raises:
        MixLoraError: the folder holds no whole adapter, or the flags contradict it.
    """
    given = given_flags(argv)
    folder = given.get(INIT_FROM)
    if folder is None:
        return []
    _check_flags(given, folder)
    kind = _kind_of(folder)
    recorded = read_fields(folder).get("base_model_name_or_path")
    base = _base(given.get("model_name_or_path"), recorded, folder)
    taken = {"model_name_or_path": base, **_taken_of_the_model(given, folder)}
    _check_projector(given, folder, kind, base)
    if kind == "MIXLORA":
        config = read_config(folder)
        if config.modules_to_save:
            raise MixLoraError(
                f"--{INIT_FROM} {folder}: modules_to_save={config.modules_to_save!r} of it cannot go on, since LLaVA's "
                "training saves factors and projector alone; continue it in Python"
            )
        for field, flag in FLAG_OF_FIELD.items():
            taken[flag] = _as_upstream_says(getattr(config, field), field, folder)
        if config.task_loss_weight:
            taken["mixlora_task_loss_weight"] = config.task_loss_weight
    return [f"--{flag}={value}" for flag, value in taken.items() if flag not in given]


def check_is_no_adapter(flags: Mapping[str, str]) -> None:
    """Refuse an adapter in the place of a model, of which upstream says nothing that helps.

    Raises:
        MixLoraError: names the flag that adapters are given with.
    """
    model = flags.get("model_name_or_path")
    file = expanded(model or "") / CONFIG_NAME
    if not model or not file.is_file() or any(_weight_files(file.parent)):
        return
    kind, base = (read_json(file).get(name) for name in ("peft_type", "base_model_name_or_path"))
    what = "a MixLoRA adapter" if is_mixlora_adapter(file.parent) else f"an adapter of type {kind}"
    raise MixLoraError(
        f"--model_name_or_path {model} is {what}, not a model; to go on from it on new data: --mixlora_enable True "
        f"--{INIT_FROM} {model} --model_name_or_path {base or 'ITS_BASE'}"
    )


def continued_config(folder: str | Path, chosen: Mapping[str, Any]) -> MixLoraConfig | None:
    """The configuration of a run that goes on from the adapter in `folder`; None where that is a plain LoRA.

    `chosen`: the fields that flags name; None where a flag is not given.

    Raises:
        MixLoraError: a field cannot be what a flag says.
    """
    if not is_mixlora_adapter(folder):
        return None
    found = read_config(folder)
    chosen = {name: value for name, value in chosen.items() if value is not None and name != "tasks"}
    for name, value in chosen.items():
        if name not in FREE and getattr(found, name) != value:
            flag = FLAG_OF_FIELD.get(name, f"mixlora_{name}")
            raise MixLoraError(
                f"--{flag} {value}: --{INIT_FROM} {folder} goes on with {name}={getattr(found, name)!r}; leave "
                f"--{flag} out, or train a new adapter without --{INIT_FROM}"
            )
    free = {name: value for name, value in chosen.items() if name in FREE}
    return dataclasses.replace(found, **free, inference_mode=False, base_model_name_or_path=None)


def continued_tasks(folder: str | Path, tasks: Sequence[str]) -> list[str]:
    """The tasks of a run that goes on with a task loss: the adapter's, of which each has factors of its own.

    Raises:
        MixLoraError: the new data have others than the adapter.
    """
    known = read_config(folder).tasks
    if not known or (others := [task for task in tasks if task not in known]):
        names = f"tasks={known!r}" if not known else f"tasks={known!r}, of which {others[0]!r} is none"
        raise MixLoraError(
            f"--mixlora_task_loss_weight: --{INIT_FROM} {folder} goes on with {names}, and each has its own factors; "
            f"use its tasks, or --mixlora_task_loss_weight 0, or train a new adapter without --{INIT_FROM}"
        )
    return list(known)


def take_over(model: PeftModel, folder: str | Path) -> None:
    """Put what the adapter in `folder` has learnt into a model that is about to be trained.

    Raises:
        MixLoraError: it does not fit the model: another base, or another vision tower.
    """
    if is_mixlora_adapter(folder):
        learnt = load_file(weights_of(folder))
        _check_tensors(model, learnt, folder)
        with _whole([each for name, each in model.named_parameters() if MixLoraModel.prefix in name]):
            peft.set_peft_model_state_dict(model, learnt, ADAPTER)
    elif os.environ.get("RANK", "0") == "0":
        print(
            f"note: {folder} is a plain LoRA: its projector goes on and its own weights do not, since they are no "
            "pools of factors; to start from what they do, merge it into its base first (LLaVA's "
            "scripts/merge_lora_weights.py) and train on the result",
            flush=True,
        )
    beside = read_non_lora_trainables(folder)
    llava = model.get_base_model()
    named = dict(llava.named_parameters())
    for name, tensor in beside.items():
        shape = tuple(getattr(named[name], "ds_shape", named[name].shape)) if name in named else None
        if shape != tuple(tensor.shape):
            has = "no such tensor" if shape is None else f"one of shape {shape}"
            raise MixLoraError(
                f"{Path(folder) / NON_LORA_TRAINABLES} holds {name} of shape {tuple(tensor.shape)}, but this model has "
                f"{has}; use the base, the vision tower and the flags that it was trained with"
            )
    with _whole([named[name] for name in beside]):
        llava.load_state_dict(beside, strict=False)


def description_of(folder: str | Path) -> str:
    """How a model card names the adapter that a run went on from: its folder and the checksum of its weights."""
    place = Path(folder).resolve()
    weights = next(place / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (place / name).is_file())
    name = f"{place.parent.name}/{place.name}" if place.name.startswith(PREFIX_CHECKPOINT_DIR) else place.name
    return f"{name} (sha256 of {weights.name}: {sha256_of(weights)})"


def _check_flags(given: Mapping[str, str], folder: str) -> None:
    if not is_true(given, "mixlora_enable"):
        raise MixLoraError(
            f"--{INIT_FROM} {folder} makes a MixLoRA adapter; add --mixlora_enable True, or leave it out"
        )
    place, output = expanded(folder), given.get("output_dir")
    place = place.resolve()
    made_by = (place, place.parent) if place.name.startswith(PREFIX_CHECKPOINT_DIR) else (place,)
    if output is not None and Path(output).resolve() in made_by:
        raise MixLoraError(
            f"--output_dir {output} is that of the run that made --{INIT_FROM} {folder}, which would go on or be "
            "written over; choose another --output_dir"
        )
    for flag, why in {
        "mixlora_preset": "the form of the method is the adapter's",
        "mixlora_router_init": "the routers are the adapter's",
    }.items():
        if flag in given:
            raise MixLoraError(f"--{flag} {given[flag]}: {why} with --{INIT_FROM} {folder}; leave --{flag} out")


def _kind_of(folder: str) -> str:
    """MIXLORA or LORA; everything that is going to be read of the adapter is checked.

    Raises:
        MixLoraError: it is of another kind, damaged, or brings no projector.
    """
    place = Path(folder)
    if not place.is_dir():
        raise MixLoraError(
            f"--{INIT_FROM} {folder}: no such folder; expected an adapter that LLaVA's training has saved"
        )
    if not (place / CONFIG_NAME).is_file():
        raise MixLoraError(
            f"--{INIT_FROM} {folder} is no adapter: it has no {CONFIG_NAME}; a model is given as --model_name_or_path"
        )
    kind = read_fields(place).get("peft_type")
    if kind not in ("MIXLORA", "LORA"):
        raise MixLoraError(f"--{INIT_FROM} {folder}: an adapter of type {kind!r}; expected MIXLORA, or a plain LORA")
    if (place / CHECKSUMS).is_file():
        verify(place)
    read(place)
    return kind


def _taken_of_the_model(given: Mapping[str, str], folder: str) -> dict[str, Any]:
    """The flags of vision tower, projector and data, as the adapter's `config.json` has them.

    Raises:
        MixLoraError: one is given that the adapter was not trained with, or its projector cannot go on.
    """
    has_projector = any("mm_projector" in name for name in read_non_lora_trainables(folder))
    if has_projector and "pretrain_mm_mlp_adapter" in given:
        raise MixLoraError(
            f"--pretrain_mm_mlp_adapter {given['pretrain_mm_mlp_adapter']}: --{INIT_FROM} {folder} brings the "
            "projector that was trained with it; leave one of them out"
        )
    if has_projector and is_true(given, "freeze_mm_mlp_adapter"):
        raise MixLoraError(
            f"--freeze_mm_mlp_adapter True: LLaVA saves no frozen projector, so that of --{INIT_FROM} {folder} would "
            "be lost; leave --freeze_mm_mlp_adapter out"
        )
    config = read_llava_config(folder) or {}
    for flag, key in OF_THE_MODEL.items():
        if flag in given and config.get(key) is not None and not _same_word(given[flag], config[key]):
            raise MixLoraError(
                f"--{flag} {given[flag]}: --{INIT_FROM} {folder} was trained with {key}={config[key]!r}, which its "
                f"projector goes on with; leave --{flag} out"
            )
    both = {**OF_THE_MODEL, **OF_THE_DATA}
    return {flag: config[key] for flag, key in both.items() if config.get(key) is not None}


def _check_projector(given: Mapping[str, str], folder: str, kind: str, base: str) -> None:
    """Refuse a run whose projector would be random, or that has nothing to go on from.

    Raises:
        MixLoraError: neither the adapter nor, where it is known, the base has one.
    """
    if any("mm_projector" in name for name in read_non_lora_trainables(folder)):
        return
    if kind == "LORA":
        raise MixLoraError(
            f"--{INIT_FROM} {folder}: of a plain LoRA only the projector goes on, and it has none in "
            f"{NON_LORA_TRAINABLES}; leave --{INIT_FROM} out"
        )
    file = expanded(base) / "config.json"
    if file.is_file() and not read_json(file).get("mm_projector_type") and "pretrain_mm_mlp_adapter" not in given:
        raise MixLoraError(
            f"--{INIT_FROM} {folder} has no projector in {NON_LORA_TRAINABLES}, nor has its base {base}; add "
            "--pretrain_mm_mlp_adapter with the projector that it was trained with"
        )


def _as_upstream_says(value: Any, field: str, folder: str) -> Any:
    """A field's value as a word of upstream's flag, some of which know less than PEFT does."""
    if field in ("r", "lora_alpha") and value != int(value):
        raise MixLoraError(
            f"--{INIT_FROM} {folder}: {field}={value!r} of it is no whole number, as LLaVA's --{FLAG_OF_FIELD[field]} "
            "asks for; continue it in Python"
        )
    return int(value) if field in ("r", "lora_alpha") else FLAG_OF_BIAS.get(value, value)


def _same_word(word: str, value: Any) -> bool:
    if isinstance(value, bool):
        return is_true({"flag": word}, "flag") == value
    # A tower or a model may have been copied to another place since.
    return word == str(value) or Path(word).name == Path(str(value)).name


def _base(given: str | None, recorded: str | None, folder: str) -> str:
    """The base that the run is about to load.

    Raises:
        MixLoraError: there is none, or the given one is not what the adapter was trained on.
    """
    if given is None:
        return base_model_of(folder, flag="--model_name_or_path")
    why = _why_another_base(expanded(given), recorded, Path(folder))
    if why is not None:
        raise MixLoraError(
            f"--model_name_or_path {given}: --{INIT_FROM} {folder} was trained on {recorded}, and {why}; leave "
            "--model_name_or_path out, or give that base"
        )
    return given


def _why_another_base(given: Path, recorded: str | None, adapter: Path) -> str | None:
    """What tells a base from the one on record; None where it is the same, as far as can be seen."""
    if not recorded or str(given) == recorded:
        return None
    record = read_record(adapter)
    on_record = None if record is None or record.base is None else record.base.fingerprint
    found = fingerprint(str(given)) if on_record is not None else None
    if found is not None:
        return ", ".join(found.differences(on_record)) or None
    known = expanded(recorded)
    if known.is_dir() and given.is_dir():
        if known.samefile(given) or _ends_of_weights(known) == _ends_of_weights(given):
            return None
        return "their weights differ"
    # One of the two is a name of the hub, or gone: then the name and the shapes tell.
    if given.name.lower() != known.name.lower():
        return "it has another name"
    of_base = given / "config.json"
    if of_base.is_file():
        ours, theirs = read_json(of_base), read_llava_config(adapter) or {}
        for name in SHAPE_OF_A_BASE:
            if name in ours and name in theirs and ours[name] != theirs[name]:
                return f"it has {name}={ours[name]!r} instead of {theirs[name]!r}"
    return None


def _ends_of_weights(folder: Path) -> str:
    """A checksum of the ends of a model's weight files: copies have the same, and other weights another."""
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        with file.open("rb") as weights:
            digest.update(weights.read(ENDS))
            size = weights.seek(0, 2)
            weights.seek(max(0, size - ENDS))
            digest.update(weights.read(ENDS) + str(size).encode())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    try:
        return weight_files(folder)
    except MixLoraError:
        return []


def _check_tensors(model: PeftModel, learnt: Mapping[str, Tensor], folder: str | Path) -> None:
    """Compare an adapter with what the model would save, statistics aside, which older adapters lack."""
    # Looked up when it is called, since for older versions of PEFT it is patched; so is its counterpart above.
    saved = peft.get_peft_model_state_dict(
        model, dict(model.named_parameters()), adapter_name=ADAPTER, save_embedding_layers=False
    )
    wanted, found = (
        {name: _shape(tensor) for name, tensor in each.items() if STATISTICS not in name} for each in (saved, learnt)
    )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            of_file, of_model = (f"of shape {each[name]}" if name in each else "missing" for each in (found, wanted))
            raise MixLoraError(
                f"--{INIT_FROM} {folder}: its tensor {name} is {of_file}, and in this model {of_model}; it was trained "
                "on another base, or on other layers of it"
            )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """While parameters are written to: those that ZeRO-3 keeps in partitions are gathered, and spread again."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(partitioned, modifier_rank=0)
