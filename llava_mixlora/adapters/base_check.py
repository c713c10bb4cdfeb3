"""Whether a base model and a vision tower are those that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..errors import MixLoraError
from .adapter_record import AdapterRecord, KnownModel, MergedAdapter, read_record
from .config_file import config_of
from .fingerprints import fingerprint, fingerprint_of_file
from .llava_config import read_llava_config

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Fields of a language model's configuration that decide the shapes of an adapter's tensors."""
FLAG = "--allow-other-base"


def check_base(folder: str | Path, base: str, allow_other: bool = False, cache_dir: str | None = None) -> None:
    """Refuse another base than that of an adapter's training, and one that the adapter is merged into already.

    What is not known is not compared: of an adapter without a record, whether its tensors fit.

    Args:
        folder: the adapter's.
        base: a folder or a hub name.
        allow_other: take another base, and say so in one line.

    Raises:
        MixLoraError: the base's layers have other shapes than those that the adapter's `config.json` tells; or, unless
            `allow_other`, it is another base.
    """
    record = read_record(folder, cache_dir)
    trained_on = f" ({record.base})" if record is not None and record.base is not None else ""
    _check_shapes(folder, base, trained_on, cache_dir)
    merged = _merged_into(folder, read_record(base, cache_dir))
    if merged is not None:
        _say_or_refuse(
            allow_other,
            f"{base} holds {folder} already: {merged.name} was merged into it; load {base} by itself, or pass the base "
            f"of its training{trained_on} as --model-base",
        )
    elif record is not None:
        _check_same(folder, base, record.base, "--model-base", allow_other, cache_dir)


def check_tower(folder: str | Path, tower: str, allow_other: bool = False, cache_dir: str | None = None) -> None:
    """As [`check_base`], of the vision tower that the adapter saw images through."""
    record = read_record(folder, cache_dir)
    if record is not None:
        _check_same(folder, tower, record.vision_tower, "--vision-tower", allow_other, cache_dir)


def merged_adapter(folder: Path) -> MergedAdapter:
    """An adapter as the record of the checkpoint that it is merged into tells it."""
    return MergedAdapter(str(folder.absolute()), fingerprint_of_file(folder / SAFETENSORS_WEIGHTS_NAME))


def record_of_merged(adapter: Path, base: str) -> AdapterRecord:
    """The record of the checkpoint that merging an adapter into a base makes."""
    record = read_record(adapter) or AdapterRecord()
    return record.with_merged(merged_adapter(adapter), before=read_record(base))


def _merged_into(folder: str | Path, of_base: AdapterRecord | None) -> MergedAdapter | None:
    if of_base is None or not of_base.merged:
        return None
    weights = fingerprint_of_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    return next((each for each in of_base.merged if weights is not None and each.weights == weights), None)


def _check_shapes(folder: str | Path, base: str, trained_on: str, cache_dir: str | None) -> None:
    found = config_of(base, cache_dir) or {}
    expected = read_llava_config(folder) or {}
    for field in SHAPE:
        if field in found and expected.get(field) is not None and found[field] != expected[field]:
            raise MixLoraError(
                f"{folder} was trained on a base with {field}={expected[field]!r}, and {base} has {found[field]!r}; "
                f"pass the base that it was trained on{trained_on} as --model-base"
            )


def _check_same(
    folder: str | Path, model: str, recorded: KnownModel | None, flag: str, allow_other: bool, cache_dir: str | None
) -> None:
    known = None if recorded is None or recorded.fingerprint is None else fingerprint(model, cache_dir)
    differences = [] if known is None else known.differences(recorded.fingerprint)
    if differences:
        what = "vision tower" if flag == "--vision-tower" else "base"
        _say_or_refuse(
            allow_other,
            f"{model} is not the {what} that {folder} was trained with ({recorded}): {_joined(differences)}; pass that "
            f"one as {flag}",
        )


def _say_or_refuse(allow_other: bool, difference: str) -> None:
    if not allow_other:
        raise MixLoraError(f"{difference}, or {FLAG} to use it all the same")
    print(f"warning: {difference}; it is used, as {FLAG} says", flush=True)


def _joined(parts: Iterable[str], most: int = 3) -> str:
    parts = list(parts)
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more
