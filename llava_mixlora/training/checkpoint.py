"""Training checkpoints that are whole or absent, and that tell when they were damaged later.

A checkpoint is written into `OUTPUT/.unfinished/`, flushed to the disk, sealed with a list of checksums, and only then
renamed to `OUTPUT/checkpoint-N`: whatever kills the run, no half checkpoint has that name. The list has the form of
`sha256sum`, so `sha256sum --check checksums.sha256` verifies a checkpoint without this package.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from ..adapters.adapter_folder import NON_LORA_TRAINABLES, check_adapter, is_mixlora_adapter, read_config
from ..errors import MixLoraError
from ..method.config import MixLoraConfig

UNFINISHED = ".unfinished"
CHECKSUMS = "checksums.sha256"
TRAINER_STATE = "trainer_state.json"
CHUNK = 1 << 22  # bytes read at once for a checksum
NEARLY_NOTHING = 1 << 20  # bytes: with less than that left, the disk counts as full
MUST_MATCH = (
    *("num_factors", "r", "pairing", "routing", "router_input", "cfs"),
    *("rank_pattern", "modules_to_save", "tasks"),
)
"""Fields of [`MixLoraConfig`] that decide which tensors an adapter has, their shapes, and whose factors they are."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, newest (largest N) first; empty when there is no such folder."""
    found = Path(output_dir).glob("checkpoint-*")
    numbered = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def unfinished(output_dir: str | Path) -> Path:
    """The folder in which the next checkpoint of `output_dir` is written."""
    return Path(output_dir) / UNFINISHED


def discard_unfinished(output_dir: str | Path) -> None:
    """Remove what a run that was killed while it saved has left."""
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Name `checkpoint` in the error when the body cannot write; what it has written so far is removed.

    Raises:
        MixLoraError: the disk is full or fails, or the folder may not be written.
    """
    try:
        yield
    except Exception as error:
        is_full = shutil.disk_usage(checkpoint.parent).free < NEARLY_NOTHING
        discard_unfinished(checkpoint.parent)
        if not _is_failed_write(error):
            raise
        reason = "the disk is full" if is_full else str(error).splitlines()[0]
        raise MixLoraError(
            f"{checkpoint} could not be written ({reason}); earlier checkpoints are as they were: make room, then the "
            "same command goes on from the newest of them"
        ) from error


def publish(output_dir: str | Path, name: str) -> Path:
    """Seal the unfinished checkpoint `name` and give it its place in `output_dir`; returns that.

    An earlier checkpoint of that name, such as a damaged one, is replaced.
    """
    written, target = unfinished(output_dir) / name, Path(output_dir) / name
    _seal(written)
    if target.exists():  # a folder that is not empty cannot be renamed over, so the old one steps aside first
        os.replace(target, unfinished(output_dir) / f"replaced-{name}")
    os.replace(written, target)
    _flush(target.parent)
    discard_unfinished(output_dir)
    return target


def remove_oldest(output_dir: str | Path, keep: int | None, best: str | Path | None = None) -> None:
    """Keep `keep` checkpoints (`--save_total_limit`, at least 1), all of them with None or 0: the newest, and the best.

    As in transformers, the newest is kept beside the best even where `keep` is 1: a run goes on from it.
    """
    if not keep:
        return
    found = checkpoints(output_dir)
    kept = found[:keep]
    if best is not None and Path(best).name not in [folder.name for folder in kept]:
        kept = [*found[: max(1, keep - 1)], Path(output_dir) / Path(best).name]
    for folder in found:
        if folder not in kept:
            shutil.rmtree(folder)


def verify(checkpoint: Path) -> None:
    """Read a checkpoint and compare it with its checksums.

    Raises:
        MixLoraError: the first file that is missing or was changed.
    """
    sums = checkpoint / CHECKSUMS
    if not sums.is_file():  # written by LLaVA without this plugin: only what is needed to go on can be checked
        for name in (NON_LORA_TRAINABLES, SAFETENSORS_WEIGHTS_NAME, TRAINER_STATE):
            if not (checkpoint / name).is_file():
                raise MixLoraError(f"{checkpoint / name} is missing")
        check_adapter(checkpoint)
        return
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        try:
            actual = sha256_of(checkpoint / name)
        except OSError as error:
            raise MixLoraError(f"{checkpoint / name} cannot be read ({error.strerror})") from error
        if actual != expected:
            raise MixLoraError(f"{checkpoint / name} is damaged: its checksum is not the one in {CHECKSUMS}")


def newest_whole(output_dir: str | Path) -> Path:
    """The newest checkpoint that is undamaged; each newer one is named on standard output, with what is wrong with it.

    Raises:
        MixLoraError: none of the checkpoints is whole.
    """
    damaged = []
    for checkpoint in checkpoints(output_dir):
        try:
            verify(checkpoint)
        except MixLoraError as error:
            damaged.append(checkpoint.name)
            print(f"{error}: skipping {checkpoint.name}", flush=True)
        else:
            return checkpoint
    raise MixLoraError(
        f"{output_dir} holds no whole checkpoint to go on from (damaged: {', '.join(damaged) or 'none'}); remove them "
        "to start anew, or choose another --output_dir"
    )


def check_same_adapter(output_dir: str | Path, wanted: MixLoraConfig) -> None:
    """Refuse to go on from checkpoints whose adapter has other tensors than the flags describe.

    Raises:
        MixLoraError: names the checkpoint, and the field that differs.
    """
    for checkpoint in checkpoints(output_dir):
        if not (checkpoint / CONFIG_NAME).is_file():
            continue
        if not is_mixlora_adapter(checkpoint):
            raise MixLoraError(f"{checkpoint} holds no MixLoRA adapter but one of another kind; {_OTHER_RUN}")
        found = read_config(checkpoint)
        for name in MUST_MATCH:
            if getattr(found, name) != getattr(wanted, name):
                raise MixLoraError(
                    f"{checkpoint} holds an adapter with {name}={getattr(found, name)!r}, but the flags say "
                    f"{getattr(wanted, name)!r}; {_OTHER_RUN}"
                )


_OTHER_RUN = "use the flags that it was trained with to go on, or choose another --output_dir"


def _seal(folder: Path) -> None:
    """Flush every file and folder below `folder`, and list the files' checksums in `CHECKSUMS`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path, flush=True)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    for path in (folder / CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def sha256_of(path: Path, flush: bool = False) -> str:
    """The checksum of a file, in hexadecimal digits; with `flush`, once the file is on the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_failed_write(error: Exception) -> bool:
    # A write that fails inside of torch is a RuntimeError, whose message is all that tells it from others.
    in_torch = any(part in str(error) for part in ("PytorchStreamWriter", "iostream error", "inline_container"))
    return isinstance(error, (OSError, SafetensorError)) or in_torch
