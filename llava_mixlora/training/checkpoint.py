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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..adapters.adapter_folder import NON_LORA_TRAINABLES
from ..errors import MixLoraError
from ..inputs import read_json
from ..own_files import own_file
from ..writing import is_failed_write, reason_of

UNFINISHED = ".unfinished"
CHECKSUMS = "checksums.sha256"
TRAINER_STATE = "trainer_state.json"
CHUNK = 1 << 22  # bytes read at once for a checksum
NEARLY_NOTHING = 1 << 20  # bytes: with less than that left, the disk counts as full
RUN = "run.json"
"""File that tells of the run which wrote a checkpoint; see `resuming`."""
NEEDED = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, "config.json", NON_LORA_TRAINABLES, TRAINER_STATE)
"""Files without which no run can go on from a checkpoint."""
STATE = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "latest", "global_step*/*", RUN)
"""Files, as patterns, with the state of optimizer, scheduler and random generators; which, depends on the run."""
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
"""A line of `sha256sum`, for a name without line breaks and backslashes."""


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
    if (left := unfinished(output_dir)).is_symlink():  # what would be written next would go where it leads
        left.unlink()
    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Name `checkpoint` in the error when the body cannot write; what it has written so far is removed.

    Raises:
        MixLoraError: the disk is full or fails, or the folder may not be written.
    """
    try:
        yield
    except BaseException as error:
        is_full = shutil.disk_usage(checkpoint.parent).free < NEARLY_NOTHING
        discard_unfinished(checkpoint.parent)
        if not is_failed_write(error):
            raise
        reason = "the disk is full" if is_full else reason_of(error)
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
        MixLoraError: the first file that is missing or was changed, or a list that does not cover the checkpoint.
    """
    sums = checkpoint / CHECKSUMS
    if not os.path.lexists(sums):  # written by LLaVA without this plugin: only what it needs itself can be checked
        if (checkpoint / RUN).is_file():
            raise MixLoraError(f"{sums} is missing")
        for name in (NON_LORA_TRAINABLES, SAFETENSORS_WEIGHTS_NAME, TRAINER_STATE):
            if not (checkpoint / name).is_file():
                raise MixLoraError(f"{checkpoint / name} is missing")
        return
    listed = _listed(checkpoint)
    for name in (*NEEDED, *_states(checkpoint)):
        if name not in listed:
            raise MixLoraError(f"{sums} is damaged: it does not list {name}")
    for name, expected in listed.items():
        if _sum_inside(checkpoint, name) != expected:
            raise MixLoraError(f"{checkpoint / name} is damaged: its checksum is not the one in {CHECKSUMS}")


def newest_whole(output_dir: str | Path, check: Callable[[Path], None] = verify) -> Path:
    """The newest checkpoint that is undamaged; each newer one is named on standard output, with what is wrong with it.

    `check`: raises a [`MixLoraError`] for one that is damaged.

    Raises:
        MixLoraError: none of the checkpoints is whole.
    """
    damaged = []
    for checkpoint in checkpoints(output_dir):
        try:
            check(checkpoint)
        except MixLoraError as error:
            damaged.append(checkpoint.name)
            print(f"{error}: skipping {checkpoint.name}", flush=True)
        else:
            return checkpoint
    raise MixLoraError(
        f"{output_dir} holds no whole checkpoint to go on from (damaged: {', '.join(damaged) or 'none'}); remove them "
        "to start anew, or choose another --output_dir"
    )


def _seal(folder: Path) -> None:
    """Flush every file and folder below `folder`, and list the files' checksums in `CHECKSUMS`."""
    lines = [f"{sha256_of(path, flush=True)}  {path.relative_to(folder).as_posix()}\n" for path in files_of(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    for path in (folder / CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def files_of(folder: Path) -> list[Path]:
    """Every file below `folder`, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _listed(checkpoint: Path) -> dict[str, str]:
    """The checksums in a checkpoint's list, by name.

    Raises:
        MixLoraError: it is no list of `sha256sum`, or it names something outside of the checkpoint.
    """
    sums, listed = checkpoint / CHECKSUMS, {}
    try:
        if own_file(checkpoint, CHECKSUMS) is None:
            raise MixLoraError(f"{sums} is missing")
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MixLoraError(f"{sums} cannot be read ({reason_of(error)})") from error
    for number, line in enumerate(lines, start=1):
        if not (match := LINE.fullmatch(line)):
            raise MixLoraError(f"{sums} is damaged: its line {number} is no checksum with a name")
        name = PurePosixPath(match[2])
        if name.is_absolute() or ".." in name.parts or str(name) != match[2]:
            raise MixLoraError(f"{sums} is damaged: its line {number} names {match[2]!r}, which is no file inside it")
        listed[match[2]] = match[1]
    return listed


def _states(checkpoint: Path) -> Iterator[str]:
    """Files with a run's state: those that are there, and those that `run.json` says were there."""
    for path in files_of(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        if any(fnmatch(name, pattern) for pattern in STATE):
            yield name
    if (checkpoint / RUN).is_file():
        yield from map(str, read_json(checkpoint / RUN, only_numbers=False).get("files") or ())


def _sum_inside(checkpoint: Path, name: str) -> str:
    """The checksum of a regular file of a checkpoint; a link could lead out of it, and a pipe would never end."""
    try:
        file = own_file(checkpoint, name)
        if file is None:
            raise MixLoraError(f"{checkpoint / name} is missing")
        return sha256_of(file)
    except OSError as error:
        raise MixLoraError(f"{checkpoint / name} cannot be read ({error.strerror})") from error


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
