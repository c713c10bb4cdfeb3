"""What a patch is: one declared replacement of one upstream symbol."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from packaging.specifiers import SpecifierSet

from llava_mixlora.errors import MixLoraError

METHOD, COMPATIBILITY, FAULT = KINDS = ("method", "compatibility", "upstream fault")
"""What a patch is there for: MixLoRA itself, versions that do not fit together, or something upstream does wrong."""
MISSING = object()
ANY_KEYWORD = "**kwargs"
"""Among a patch's `parameters`: the target takes keywords that it does not name."""


class PatchError(MixLoraError):
    """A symbol that a patch replaces is not where the patch expects it, or not what it expects."""


@dataclass
class Patch:
    """A replacement for one upstream symbol, applied at most once and undone exactly.

    Args:
        target: `"module:attribute"` or `"module:Class.attribute"`.
        kind: of [`KINDS`].
        why: one sentence for the reader, and for the error when the target is gone.
        replace: makes the replacement from the original; gets None when `adds` is set.
        parameters: names that the target must take, since the patch relies on them, or [`ANY_KEYWORD`]; it may take
            others.
        requires: package versions that need the patch, such as `{"transformers": ">=5"}`; elsewhere it is skipped.
        adds: the symbol does not exist there (it has moved or was dropped) and the patch puts it back.
        program: the module is a program that begins to act when it is imported: only `llava-mixlora run` patches it,
            when it is what is to be run.

    Raises:
        PatchError: on `apply`, when the target does not exist, or with `adds`, when it does, or lacks a parameter.
    """

    target: str
    kind: str
    why: str
    replace: Callable[[Any], Any]
    parameters: tuple[str, ...] = ()
    requires: dict[str, str] = field(default_factory=dict)
    adds: bool = False
    program: bool = False
    _undo: Callable[[], None] | None = field(default=None, init=False, repr=False)

    @property
    def module(self) -> str:
        """Name of the module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def applied(self) -> bool:
        """Whether the replacement is in place."""
        return self._undo is not None

    @property
    def needed(self) -> bool:
        """Whether the installed versions need it."""
        return all(_installed(package) in SpecifierSet(spec) for package, spec in self.requires.items())

    def apply(self) -> None:
        """Put the replacement in place, if it is needed and not there yet."""
        if self.applied or not self.needed:
            return
        owner, name = self._locate()
        original = getattr(owner, name, MISSING)
        if (original is MISSING) != self.adds:
            expected = "to be missing" if self.adds else "to exist"
            raise self._error(f"expected it {expected}")
        self._check_parameters(original)
        own = vars(owner).get(name, MISSING)  # an inherited attribute is shadowed here, and uncovered by undo()
        setattr(owner, name, self.replace(None if self.adds else original))
        self._undo = (lambda: delattr(owner, name)) if own is MISSING else (lambda: setattr(owner, name, own))

    def undo(self) -> None:
        """Restore what was there before; does nothing when the patch is not applied."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _locate(self) -> tuple[Any, str]:
        *outer, name = self.target.partition(":")[2].split(".")
        try:
            owner = importlib.import_module(self.module)
            for step in outer:
                owner = getattr(owner, step)
        except (ImportError, AttributeError) as error:
            raise self._error(str(error)) from error
        return owner, name

    def _check_parameters(self, original: Any) -> None:
        if not self.parameters:
            return
        any_keyword = inspect.Parameter.VAR_KEYWORD
        signature = inspect.signature(original).parameters.values()
        found = [ANY_KEYWORD if parameter.kind is any_keyword else parameter.name for parameter in signature]
        missing = [name for name in self.parameters if name not in found]
        if missing:
            raise self._error(f"expected the parameter {missing[0]!r}, found: {', '.join(found) or 'none'}")

    def _error(self, problem: str) -> PatchError:
        return PatchError(
            f"cannot patch {self.target}: {problem}. It comes from {_origin(self.module.partition('.')[0])}. The patch "
            f"is there because {self.why}; is this a fork or a version that the plugin does not know?"
        )


def _origin(package: str) -> str:
    """Where an import of `package` finds it and, where that is known, as which version."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        spec = None
    if spec is None or spec.origin is None:
        return f"{package}, which is not installed"
    folder = Path(spec.origin).parent
    for name in packages_distributions().get(package, ()):
        if _holds(distribution(name), folder):
            return f"{folder} ({name} {version(name)})"
    return f"{folder}"


def _holds(installed: Distribution, folder: Path) -> bool:
    # Installed for editing, a distribution lies beside the place that it was installed from.
    url = json.loads(installed.read_text("direct_url.json") or "{}").get("url", "")
    source = Path(unquote(urlparse(url).path)) if url.startswith("file:") else None
    return Path(installed.locate_file(folder.name)) == folder or (source is not None and source in folder.parents)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise PatchError(
            f"{package} is not installed, but LLaVA needs it; `llava-mixlora doctor` tells the command"
        ) from error
