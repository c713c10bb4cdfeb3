"""What a patch is: one declared replacement of one upstream symbol."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

from llava_mixlora.errors import MixLoraError
from llava_mixlora.import_failures import first_cause
from llava_mixlora.llava_package import ORIGINAL, LlavaPackage, used
from llava_mixlora.llava_version import origin

METHOD, COMPATIBILITY, FAULT = KINDS = ("method", "compatibility", "upstream fault")
"""What a patch is there for: MixLoRA itself, versions that do not fit together, or something upstream does wrong."""
MISSING = object()
ANY_KEYWORD = inspect.Parameter.VAR_KEYWORD
TRAINING = "llava.train."
"""What of LLaVA only a run that trains needs; its loader is what all others need."""


class _Imported:
    """`sys.modules`, whose modules are its attributes."""


_IMPORTED = _Imported()
_IMPORTED.__dict__ = sys.modules


class PatchError(MixLoraError):
    """A symbol that a patch replaces is not where the patch expects it, or not what it expects."""


@dataclass
class Patch:
    """A replacement for one upstream symbol, applied at most once and undone exactly.

    Args:
        target: `"module:attribute"`, `"module:Class.attribute"` or, with `adds`, a whole `"module"`, of LLaVA as LLaVA
            itself has it: in a fork it is the like of that, found by what it is (see [`LlavaPackage.places`]), in more
            than one place for language models.
        kind: of [`KINDS`].
        why: one sentence for the reader, and for the error when the target is gone.
        replace: makes the replacement from the original, or gives that back where there is nothing to mend; gets None
            when `adds` is set.
        parameters: names that the target must take, since the patch relies on them; it may take others.
        requires: package versions that need the patch, such as `{"transformers": ">=5"}`; elsewhere it is skipped.
        adds: the symbol does not exist there (it has moved or was dropped) and the patch puts it back.
        imported: with `adds`, a symbol that some LLaVAs import: it is put back only where the one that is used does,
            and left alone where it still exists.
        program: the module is a program that begins to act when it is imported: only `llava-mixlora run` patches it,
            when it is what is to be run.

    A fork may lack a target of LLaVA's, or have another one: where the run can do without the patch it is left out.

    Raises:
        PatchError: on `apply`, when the target does not exist, or with `adds`, when it does, or lacks a parameter, and
            the run needs the patch.
    """

    target: str
    kind: str
    why: str
    replace: Callable[[Any], Any]
    parameters: tuple[str, ...] = ()
    requires: dict[str, str] = field(default_factory=dict)
    adds: bool = False
    imported: str | None = None
    program: bool = False
    problem: str | None = field(default=None, init=False, repr=False)
    """Why it was left out, where it was needed and does not fit."""
    _undo: list[Callable[[], None]] = field(default_factory=list, init=False, repr=False)

    @property
    def module(self) -> str:
        """Name of the module that holds the target, in LLaVA itself."""
        return self.target.partition(":")[0]

    @property
    def places(self) -> tuple[str, ...]:
        """The target in the LLaVA that is used; none where that has nothing of the kind."""
        return used().places(self.target)

    @property
    def applied(self) -> bool:
        """Whether the replacement is in place."""
        return bool(self._undo)

    @property
    def needed(self) -> bool:
        """Whether the installed versions need it, and the LLaVA that is used."""
        if self.imported is not None and not used().imports(*self.imported.split(":")):
            return False
        return all(_installed(package) in SpecifierSet(spec) for package, spec in self.requires.items())

    def can_be_left_out(self, package: LlavaPackage) -> bool:
        """Whether a run of that LLaVA does without the patch, where it does not fit."""
        if self.imported is not None:  # the LLaVA that imports it says best what is missing
            return True
        if self.module.partition(".")[0] != ORIGINAL:
            return False
        return self.kind != METHOD or self.program or self.module.startswith(TRAINING) != package.trains

    def apply(self) -> None:
        """Put the replacement in place, if it is needed and not there yet."""
        if self.applied or not self.needed:
            return
        self.problem = None  # it may have been another LLaVA's
        problems = [] if self.places else [self._error("expected it to exist")]
        for place in self.places:
            try:
                self._replace(place)
            except PatchError as error:
                problems.append(error)
        # Of several language models a LLaVA does without those that cannot be imported here.
        if problems and not self.applied:
            self.problem = str(problems[0])
            if not self.can_be_left_out(used()):
                raise problems[0]

    def _replace(self, place: str) -> None:
        owner, name = self._locate(place)
        original = getattr(owner, name, MISSING)
        if self.imported is not None and original is not MISSING:
            return
        if (original is MISSING) != self.adds:
            expected = "to be missing" if self.adds else "to exist"
            raise self._error(f"expected it {expected}")
        self._check_parameters(original)
        replacement = self.replace(None if self.adds else original)
        if replacement is original:  # there is nothing to mend in this LLaVA
            return
        own = vars(owner).get(name, MISSING)  # an inherited attribute is shadowed here, and uncovered by undo()
        setattr(owner, name, replacement)
        self._undo.append(lambda: delattr(owner, name) if own is MISSING else setattr(owner, name, own))

    def undo(self) -> None:
        """Restore what was there before; does nothing when the patch is not applied."""
        self.problem = None
        while self._undo:
            self._undo.pop()()

    def _locate(self, place: str) -> tuple[Any, str]:
        module, _, attribute = place.partition(":")
        if not attribute:
            with suppress(ModuleNotFoundError):  # one that is there is found there
                importlib.import_module(module)
            return _IMPORTED, module
        *outer, name = attribute.split(".")
        try:
            owner = importlib.import_module(module)
        except Exception as error:  # a package can fail at its import in any way
            raise PatchError(
                f"cannot patch {place}: {module} cannot be imported: {first_cause(error, used())}. It comes from "
                f"{origin(_package(module))}"
            ) from error
        for step in outer:
            try:
                owner = getattr(owner, step)
            except Exception as error:  # what is imported on demand can fail too
                raise self._error(first_cause(error, used())) from error
        return owner, name

    def _check_parameters(self, original: Any) -> None:
        if not self.parameters:
            return
        signature = inspect.signature(original)
        found = list(signature.parameters)
        if {parameter.kind for parameter in signature.parameters.values() if parameter.name != "self"} == {ANY_KEYWORD}:
            return  # it hands on what it is given
        missing = [name for name in self.parameters if name not in found]
        if missing:
            raise self._error(f"expected the parameter {missing[0]!r}, found: {', '.join(found) or 'none'}")

    def _error(self, problem: str) -> PatchError:
        place = next(iter(self.places), self.target)
        package = used().name if not self.places and _package(place) == ORIGINAL else _package(place)
        return PatchError(
            f"cannot patch {place}: {problem}. It comes from {origin(package)}. The patch "
            f"is there because {self.why}; is this a fork or a version that the plugin does not know?"
        )


def _package(place: str) -> str:
    return place.partition(":")[0].partition(".")[0]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise PatchError(
            f"{package} is not installed, but LLaVA needs it; `llava-mixlora doctor` tells the command"
        ) from error
