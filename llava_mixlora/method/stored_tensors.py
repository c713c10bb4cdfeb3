"""Which tensors a MIXLORA adapter has to hold, and whether those that a file or a state dict holds are these.

Names and shapes of a file are read off its header, so nothing is allocated for what does not fit. An adapter for which
tensors are missing would run, on what its layers started with, and answer as if it had hardly been trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import MixLoraError
from ..own_files import own_file
from .tensor_names import PEFT_PREFIX
from .word_centre import WORDS

FLOATS = ("F32", "F16", "BF16", "F64")
OF_TORCH = {
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"},
    **{torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""What safetensors calls the dtypes that PyTorch has."""
NAMED = 3  # tensors that a message names; of others it tells the number
PART = ".mixlora_"
STATISTICS = {"mixlora_stats_usage": "I64", "mixlora_stats_moments": "F64"}
"""Sums of training, which an adapter can be without, and their dtypes."""
WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT puts the head's possible names among the modules to save."""
INCOMPLETE = "--allow-incomplete"


class Pools(Protocol):
    """What an adapter's tensors depend on, of a [`MixLoraConfig`]."""

    num_factors: int
    pairing: str
    routing: str
    router_input: str
    cfs: str
    bias: str
    modules_to_save: Iterable[str] | None

    def rank_of(self, layer: str) -> int: ...


class Form(NamedTuple):
    """What can be known of a tensor without its numbers: its dtype, as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Widths(NamedTuple):
    """Of an adapted linear layer: d_in, d_out, and how wide what its router sees is (None: not known)."""

    d_in: int | None
    d_out: int | None
    router: int | None


_incomplete: ContextVar[bool] = ContextVar("whether adapters may lack tensors", default=False)


@contextmanager
def allowing_incomplete(allowed: bool = True) -> Iterator[None]:
    """Load adapters in the body even where tensors are missing, which then stay what an untrained adapter has."""
    token = _incomplete.set(allowed or _incomplete.get())
    try:
        yield
    finally:
        _incomplete.reset(token)


def incomplete_is_allowed() -> bool:
    """Whether [`allowing_incomplete`] is in force."""
    return _incomplete.get()


def forms_in(file: Path) -> dict[str, Form]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        MixLoraError: it is damaged.
    """
    try:
        with safe_open(str(file), framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no dictionary
            return {name: Form(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MixLoraError(f"{file} is damaged ({reason}); copy it again or train again") from error


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """As [`forms_in`], of tensors in memory."""
    return {
        name: Form(OF_TORCH.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def check_beside(config: Pools, folder: Path) -> None:
    """Compare the pools that lie in the folder of a configuration with it; nothing where none do.

    What else lies there is compared with the model when it is loaded.

    Raises:
        MixLoraError: as [`forms_in`] and [`check_tensors`].
    """
    if (file := own_file(folder, SAFETENSORS_WEIGHTS_NAME)) is not None:
        forms, saved = forms_in(file).items(), config.modules_to_save
        own = {name: form for name, form in forms if "mixlora_" in name or is_beside_the_pools(name, "none", saved)}
        check_tensors(config, own, file)


def check_tensors(
    config: Pools,
    found: Mapping[str, Form],
    place: str | Path,
    layers: Mapping[str, Widths] | None = None,
    word_width: int | None = None,
) -> None:
    """Compare tensors with those that an adapter of this configuration has.

    Args:
        config: the adapter's.
        found: the tensors' forms by the names that PEFT saves them under.
        place: where they are from, for the message.
        layers: the layers that the base model has for it, by their names there; None where that is not known. Those
            that the tensors are of are taken for all of them then.
        word_width: of the base's word vectors; None where it is not known.

    Raises:
        MixLoraError: tensors are unknown, of another form, or missing, unless [`allowing_incomplete`].
    """
    found = {name.removeprefix(PEFT_PREFIX): form for name, form in found.items()}
    of_layers: dict[str, dict[str, Form]] = {}
    for name, form in found.items():
        layer, dot, part = name.rpartition(PART)
        if dot:
            of_layers.setdefault(layer, {})[f"{PART[1:]}{part}"] = form
    if not of_layers:
        raise MixLoraError(f"{place} holds no tensors of a MIXLORA adapter; copy it again or train again")
    check_known(found, place, [name for name in found if not _is_known(name, config, of_layers, layers)])
    missing = []
    for layer in {**dict.fromkeys(layers or ()), **dict.fromkeys(of_layers)}:
        parts = of_layers.get(layer, {})
        widths = (layers or {}).get(layer, Widths(None, None, None))
        if widths.router is None and config.router_input == "words":
            widths = widths._replace(router=word_width)
        wanted = _forms_of_layer(config, layer, parts, widths)
        missing += [f"{layer}.{part}" for part in wanted if part not in parts]
        _check_layer(config, layer, parts, wanted, place)
    if config.router_input == "words":
        if WORDS in found:
            check_form(WORDS, found[WORDS], (None if word_width is None else word_width + 1,), ("F64",), place)
        else:
            missing.append(WORDS)
    missing += [f"{module}.*" for module in _unsaved(config, found)]
    check_complete(missing, len(found) + len(missing), place)


def check_known(found: Iterable[str], place: str | Path, unknown: Sequence[str]) -> None:
    """Refuse tensors that nothing asks for.

    Raises:
        MixLoraError: names the first of them, and tells how many there are.
    """
    if unknown:
        raise MixLoraError(
            f"{place} holds {named(unknown)} ({len(unknown)} of {len(list(found))} tensors), which no adapter of its "
            "configuration has; is its adapter_config.json that of another adapter?"
        )


def check_complete(missing: Sequence[str], of: int, place: str | Path) -> None:
    """Refuse what lacks tensors, unless [`allowing_incomplete`]. `of`: how many there should be.

    Raises:
        MixLoraError: names the first of them, and tells how many there are.
    """
    if missing and not incomplete_is_allowed():
        raise MixLoraError(
            f"{place} lacks {named(missing)} ({len(missing)} of {of} tensors); copy it again or train again "
            f"(commands that ask a model load it as it is with {INCOMPLETE})"
        )


def check_form(
    name: str, form: Form, shape: Sequence[int | None], dtypes: Sequence[str], place: str | Path, hint: str = ""
) -> None:
    """Refuse a tensor of another shape or dtype. `shape`: with None for sizes that are not known.

    Raises:
        MixLoraError: names the tensor, what it is and what it should be.
    """
    fits = len(form.shape) == len(shape) and all(size in (None, has) for size, has in zip(shape, form.shape))
    if not fits or 0 in form.shape:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise MixLoraError(
            f"{place}: {name} has the shape {list(form.shape)}, expected [{wanted}]{hint}; are its files of different "
            "adapters, or is it damaged?"
        )
    if form.dtype not in dtypes:
        raise MixLoraError(f"{place}: {name} is stored as {form.dtype}, expected {' or '.join(dtypes)}; copy it again")


def check_finite(tensors: Iterable[tuple[str, Tensor]], place: str | Path) -> None:
    """Refuse tensors with numbers that are none, reading one after the other.

    Raises:
        MixLoraError: names the first of them, and tells how many there are.
    """
    broken = [name for name, tensor in tensors if not _is_finite(tensor)]
    if broken:
        raise MixLoraError(
            f"{place}: {named(broken)} ({len(broken)} tensors) are not finite (NaN or infinity): the training went "
            "wrong, or the file is damaged; use an earlier checkpoint"
        )


def named(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are besides."""
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in map(str, names[:NAMED])]
    rest = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(" ".join(repr(name)[1:-1].split()) for name in shown) + rest


def is_beside_the_pools(name: str, bias: str, modules_to_save: Iterable[str] | None) -> bool:
    """Whether an adapter's file may hold the tensor `name` of the base: a trained bias, or a module that it saves."""
    saved = any(f".{module}." in f".{name}" for module in modules_to_save or ())
    return saved or (bias != "none" and name.endswith(".bias"))


def _unsaved(config: Pools, found: Iterable[str]) -> list[str]:
    """The modules that an adapter is said to save, and does not."""
    if getattr(config, "task_type", None) in WITH_A_HEAD:  # PEFT saves whichever of several names the head has
        return []
    saved = [f".{name}" for name in found if PART not in name]
    return [module for module in config.modules_to_save or () if not any(f".{module}." in name for name in saved)]


def _is_known(name: str, config: Pools, of_layers: Mapping[str, object], layers: Mapping[str, object] | None) -> bool:
    if name == WORDS:
        return config.router_input == "words"
    layer, dot, part = name.rpartition(PART)
    if not dot:
        return is_beside_the_pools(name, config.bias, config.modules_to_save)
    part = f"{PART[1:]}{part}"
    if layers is not None and layer not in layers:
        return False
    return part in STATISTICS or part in _parts(config)


def _parts(config: Pools) -> tuple[str, ...]:
    """The parameters that each layer has."""
    routers = ("mixlora_router_A",) if config.pairing == "same" else ("mixlora_router_A", "mixlora_router_B")
    return (
        *("mixlora_A", "mixlora_B"),
        *(() if config.routing == "random" else routers),
        *(("mixlora_cfs",) if config.routing == "ifs_cfs" else ()),
    )


def _forms_of_layer(
    config: Pools, layer: str, parts: Mapping[str, Form], widths: Widths
) -> dict[str, tuple[int | None, ...]]:
    """The shape of each parameter; of what is not known of the layer, the pools tell the rest."""

    def last(part: str) -> int | None:
        return parts[part].shape[-1] if part in parts and parts[part].shape else None

    E, d_in = config.num_factors, last("mixlora_A") if widths.d_in is None else widths.d_in
    router = widths.router
    if router is None:
        router = last("mixlora_router_A") if config.router_input == "words" else d_in
    shapes = {
        "mixlora_A": (E, d_in),
        "mixlora_B": (E, widths.d_out),
        "mixlora_router_A": (E, router),
        "mixlora_router_B": (E, router),
        "mixlora_cfs": (config.rank_of(layer), E, E if config.cfs == "table" else d_in),
    }
    return {part: shapes[part] for part in _parts(config)}


def _check_layer(
    config: Pools,
    layer: str,
    parts: Mapping[str, Form],
    wanted: Mapping[str, tuple[int | None, ...]],
    place: str | Path,
) -> None:
    E = config.num_factors
    hint = f" (num_factors={E}, r={config.rank_of(layer)})"
    for part, form in parts.items():
        if part in STATISTICS:
            shape = (2, E) if part.endswith("usage") else (4, E, E)
            check_form(f"{layer}.{part}", form, shape, (STATISTICS[part],), place, hint)
        else:
            check_form(f"{layer}.{part}", form, wanted[part], FLOATS, place, hint)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # In one pass, and without a mask as large as the tensor: both ends of what is not a number are not one either.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
