"""Which code a LLaVA is: its folder, with the version and the commit that it has, as far as it has any."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

from .llava_package import folder_of

INSTALLED = ("site-packages", "dist-packages")


def origin(package: str) -> str:
    """Where an import of a package finds it, and as which version and commit; the package is not imported."""
    folder = _folder(package)
    return f"{package}, which is not installed" if folder is None else described(package, folder)


def described(package: str, folder: Path) -> str:
    """A package's folder, and what tells its code from another of the same name."""
    installed = distribution_of(package, folder)
    version = f"{installed.name} {installed.version}" if installed is not None else _of_its_project(folder)
    known = [word for word in (version, _commit(folder)) if word is not None]
    return f"{folder} ({', '.join(known)})" if known else str(folder)


def distribution_of(package: str, folder: Path) -> Distribution | None:
    """What pip has installed a package from, if it is the one in that folder and not another of its name."""
    candidates = (distribution(name) for name in packages_distributions().get(package, ()))
    return next((one for one in candidates if _holds(one, folder)), None)


def hidden_copies(package: str) -> list[Path]:
    """Folders of packages of the same name that an import would find if the one that it finds were not there."""
    found = [Path(place).resolve() for place in _places(package)]
    return list(dict.fromkeys(found))[1:]


def of_copies(package: str, hidden: list[Path]) -> str:
    """What a package hides, in words that go on from its own name."""
    others = " and ".join(described(package, folder) for folder in hidden)
    return (
        f"hides another {package}, {others}: the first on Python's path counts; take one away (PYTHONPATH, the current "
        "folder, pip uninstall) if the other was meant"
    )


def _places(package: str) -> Iterator[str]:
    specs = [importlib.util.find_spec(package)]
    specs += [PathFinder.find_spec(package, [entry]) for entry in sys.path]
    specs += [finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, "find_spec")]
    for spec in specs:
        if spec is not None and spec.origin is not None:  # a folder without __init__.py hides nothing
            yield from list(spec.submodule_search_locations or ())[:1]


def _folder(package: str) -> Path | None:
    if (folder := folder_of(package)) is not None:
        return folder
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _holds(installed: Distribution, folder: Path) -> bool:
    # Installed for editing, a distribution lies beside the place that it was installed from.
    url = json.loads(installed.read_text("direct_url.json") or "{}").get("url", "")
    source = Path(unquote(urlparse(url).path)) if url.startswith("file:") else None
    return Path(installed.locate_file(folder.name)) == folder or (source is not None and source in folder.parents)


def _of_its_project(folder: Path) -> str | None:
    """Name and version by the `pyproject.toml` beside a package's folder."""
    try:
        text = (folder.parent / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    project = re.search(r"^\[project\]$(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    found = dict(re.findall(r"^(name|version)\s*=\s*[\"']([^\"']*)[\"']", project[1] if project else "", re.MULTILINE))
    return f"{found['name']} {found['version']} by its pyproject.toml" if len(found) == 2 else None


def _commit(folder: Path) -> str | None:
    """The commit of the clone that a folder lies in."""
    if set(INSTALLED) & set(folder.parts):  # an environment may lie in somebody's own clone
        return None
    clone = next((each for each in folder.parents if (each / ".git" / "HEAD").is_file()), None)
    if clone is None:
        return None
    git = clone / ".git"
    head = _read(git / "HEAD")
    name = head.removeprefix("ref: ")
    packed = re.search(rf"^([0-9a-f]{{40}}) {re.escape(name)}$", _read(git / "packed-refs"), re.MULTILINE)
    commit = head if name == head else _read(git / name) or (packed[1] if packed else "")
    return f"commit {commit[:7]}" if re.fullmatch("[0-9a-f]{40}", commit) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
