"""Output folders and files that are either complete or absent."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(target: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder that takes the name ``target`` when the block ends without an error.

    The folder is made beside ``target`` so that the last step is a rename. An earlier result under the same name is
    replaced; it is recognised by the file ``marker``, which the block must write too.

    Raises:
        FileExistsError: ``target`` holds something else, which is left as it is.
        FileNotFoundError: the block did not write ``marker``; nothing appears under ``target``.
    """
    target = Path(target).absolute()
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is no earlier result (no {marker} in it): remove it or choose another output folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if not (new / marker).is_file():
            raise FileNotFoundError(f"{new} was left without {marker}: {target} stays as it was")
        if target.exists():
            # A folder that is not empty cannot be renamed over, so the old one steps aside first.
            os.replace(target, work / "old")
        os.replace(new, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, the form of LLaVA's own data files."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
