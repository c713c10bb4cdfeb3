"""What goes wrong in a LLaVA itself, in one line: its first cause, also where the package hides that.

Many LLaVAs import their models in a `try` whose `except` says nothing; what is told at the end is then that a name is
missing. [`noted`] sees what each module of a package raises on its way there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .errors import MixLoraError
from .llava_package import LlavaPackage, used

NOTE = "_import_failure"
"""Name under which an error that a module's import has raised carries its [`Failure`]; errors are not kept alive."""


@dataclass
class Failure:
    """What the import of a module has raised.

    Args:
        words: the error, its place and what to do, in one line.
        modules: those that it has ended, innermost first.
    """

    words: str
    modules: list[str] = field(default_factory=list)


_noted: dict[str, list[Failure]] = {}
"""By package, in the order in which they came."""


@contextmanager
def noted(package: LlavaPackage) -> Iterator[None]:
    """See what the imports of a package's modules raise, though the package may catch it itself."""
    finder = _Noting(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Noting(MetaPathFinder):
    """Lets the other finders find a module, and notes how its execution ends."""

    def __init__(self, package: LlavaPackage) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package.name:
            return None
        others = (each for each in sys.meta_path if not isinstance(each, _Noting) and hasattr(each, "find_spec"))
        spec = next(filter(None, (each.find_spec(name, path, target) for each in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._note_failures_of(spec.loader, name)
        return spec

    def _note_failures_of(self, loader: Any, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except Exception as error:
                failure = getattr(error, NOTE, None)
                if failure is None:
                    failure = Failure(first_cause(error, self.package))
                    setattr(error, NOTE, failure)
                    _noted.setdefault(self.package.name, []).append(failure)
                failure.modules.append(name)
                raise

        loader.exec_module = exec_module


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Tell in one line what the LLaVA that is used does wrong; errors of other code keep all of their lines.

    Raises:
        MixLoraError: a module of it cannot be imported, its loader raises, or a name that it uses is defined nowhere.
    """
    try:
        yield
    except MixLoraError:
        raise
    except Exception as error:
        if (words := failure_of(error)) is None:
            raise
        raise MixLoraError(words) from error


def failure_of(error: Exception) -> str | None:
    """What to say in one line of an error that the LLaVA that is used has made; None where it is another's.

    It has where a module of it cannot be imported, its loader raises, or a name that it uses is defined nowhere.
    """
    package = used()
    failure = getattr(error, NOTE, None)
    if failure is not None:
        return f"{failure.modules[-1]} cannot be imported: {failure.words}"
    if (loader := _loader_in(error.__traceback__, package)) is not None:
        return f"{loader} of {package.name} has failed: {first_cause(error, package)}"
    if type(error) is NameError and _is_of(_last_file(error), package):
        return f"{package.name} cannot do this: {first_cause(error, package)}"
    return None


def first_cause(error: BaseException, package: LlavaPackage) -> str:
    """An error's first cause, where it is, and what to do about it, in one line.

    Args:
        error: as it came out of the package's code.
        package: what its own code raises in the place of something else is told last.
    """
    first = error
    while (inner := _inner(first, package)) is not None:
        first = inner
    hidden = _hidden_by(first, package)
    if hidden is not None:
        return hidden.words
    noted_before = getattr(first, NOTE, None)
    cause = noted_before.words if noted_before else f"{_words(first)}{_place(first, package)}{_advice(first, package)}"
    return cause if first is error or _is_lazy(error) else f"{cause}. Its own words for that: {_words(error)}"


def _inner(error: BaseException, package: LlavaPackage) -> BaseException | None:
    """What an error stands in the place of: where the package's own code, or an import on demand, has raised it."""
    if _is_lazy(error):
        return error.__cause__
    if isinstance(error, MixLoraError) or not _is_of(_last_file(error), package):
        return None
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_lazy(error: BaseException) -> bool:
    """Whether it is what transformers says where a module that it imports on demand fails, in newer and older words."""
    says_so = isinstance(error, ImportError) or str(error).startswith("Failed to import ")
    return says_so and error.__cause__ is not None


def _hidden_by(error: BaseException, package: LlavaPackage) -> Failure | None:
    """What the package itself has caught, whereupon a name is missing that the failed module would have defined."""
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] != package.name:
        return None
    missing = re.search(r"cannot import name '(\w+)'", str(error))
    if missing is None:
        return None
    failures = _noted.get(package.name, [])
    defining = set(package.modules_with(missing[1]))
    of_these = [failure for failure in failures if defining & set(failure.modules)]
    # The first of several imports in one `try` leaves out those behind it, whose modules have not failed themselves.
    inner = [failure for failure in failures if failure.modules[-1].startswith(f"{error.name}.")]
    return next(iter(of_these or inner), None)


def _words(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _place(error: BaseException, package: LlavaPackage) -> str:
    found = [frame for frame in _frames(error.__traceback__) if _is_of(frame[0], package)]
    return f" ({found[-1][0]}, line {found[-1][1]})" if found else ""


def _advice(error: BaseException, package: LlavaPackage) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != package.name:
        module = error.name.partition(".")[0]
        if module in sys.modules:
            return f"; {package.name} was written for another version of {module}"
        return f"; install what {package.name} imports as {module}"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in ("", package.name):
        return f"; {package.name} was written for another version of {error.name.partition('.')[0]}"
    if isinstance(error, (NameError, SyntaxError)):
        return f"; no version of {package.name} that says so can run: mend that line, or take another commit of it"
    return ""


def _loader_in(traceback: TracebackType | None, package: LlavaPackage) -> str | None:
    loaders = {place.rpartition(":")[2] for place in package.places("llava.model.builder:load_pretrained_model")}
    for file, _, name in _frames(traceback):
        if name in loaders and _is_of(file, package):
            return name
    return None


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        yield code.co_filename, traceback.tb_lineno, code.co_name
        traceback = traceback.tb_next


def _last_file(error: BaseException) -> str | None:
    return ([file for file, _, _ in _frames(error.__traceback__)] or [None])[-1]


def _is_of(file: str | None, package: LlavaPackage) -> bool:
    return file is not None and package.folder is not None and package.folder in Path(file).parents
