"""Files of a folder that may come from a stranger: regular ones, and no links that lead out of it.

A link could name any file of this machine, which would then be copied into a result, and a pipe or a device never ends.
The cache of the Hugging Face hub is made of links: `models--OWNER--NAME/snapshots/COMMIT/FILE` leads to `blobs/` of the
same repository, and so stays inside.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from .errors import MixLoraError

REPOSITORIES = ("models--", "datasets--", "spaces--")
"""How the folders of the hub's cache begin."""


def own_file(folder: str | Path, name: str) -> Path | None:
    """The file `name` of a folder; None where it has none.

    Raises:
        MixLoraError: it is a link out of the folder, or no regular file.
    """
    file = Path(folder) / name
    if not os.path.lexists(file):
        return None
    try:
        home, target = Path(folder).resolve(), file.resolve()
        kind = target.stat().st_mode
    except OSError as error:  # a link to nothing, or to itself
        raise MixLoraError(f"{file} cannot be read ({error.strerror}); copy it again") from error
    except RuntimeError as error:  # to itself, before Python 3.13
        raise MixLoraError(f"{file} is a link that leads to itself; copy it again") from error
    if home not in target.parents and _blobs_of(home) != target.parent:
        raise MixLoraError(f"{file} is a link to {target}, outside of its folder; put a copy in its place")
    if not stat.S_ISREG(kind):
        raise MixLoraError(f"{file} is no regular file; expected one, so copy it again")
    return file


def copy_own(folder: str | Path, name: str, target: Path) -> bool:
    """Copy the file `name` of a folder into the folder `target`; returns whether there is one.

    Raises:
        MixLoraError: as [`own_file`].
    """
    file = own_file(folder, name)
    if file is not None:
        shutil.copyfile(file, target / name)
    return file is not None


def own_place(folder: str | Path, name: str) -> Path:
    """Where a command writes `name` in a folder that it was given for another purpose.

    Raises:
        MixLoraError: a link is there, which could lead anywhere.
    """
    place = Path(folder) / name
    if place.is_symlink():
        raise MixLoraError(f"{place} is a link, and nothing is written through it; choose another --output")
    return place


def _blobs_of(home: Path) -> Path | None:
    """Where the hub's cache keeps the contents of a snapshot's files."""
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(REPOSITORIES):
            return snapshots.parent / "blobs"
    return None
