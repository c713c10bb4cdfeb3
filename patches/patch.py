"""What a patch is: one declared replacement of one upstream symbol."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

from llava_mixlora.errors import MixLoraError

MISSING = object()


class PatchError(MixLoraError):
    """A symbol that a patch replaces is not where the patch expects it."""


@dataclass
class Patch:
    """A replacement for one upstream symbol, applied at most once and undone exactly.

    Args:
        target: `"module:attribute"` or `"module:Class.attribute"`.
        why: one sentence for the reader, and for the error when the target is gone.
        replace: makes the replacement from the original; gets None when `adds` is set.
        requires: package versions that need the patch, such as `{"transformers": ">=5"}`; elsewhere it is skipped.
        adds: the symbol does not exist there (it has moved or was dropped) and the patch puts it back.
        program: the module is a program that begins to act when it is imported: only `llava-mixlora run` patches it,
            when it is what is to be run.

    Raises:
        PatchError: on `apply`, when the target does not exist, or with `adds`, when it does.
    """

    target: str
    why: str
    replace: Callable[[Any], Any]
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
            raise PatchError(f"cannot patch {self.target}: expected it {expected}. {self._advice()}")
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
            raise PatchError(f"cannot patch {self.target}: {error}. {self._advice()}") from error
        return owner, name

    def _advice(self) -> str:
        return f"The patch is there because {self.why}; is this a fork or a version of LLaVA it does not know?"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise PatchError(f"{package} is not installed, but LLaVA needs it; run scripts/setup.sh") from error
