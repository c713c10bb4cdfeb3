"""The LLaVA that a model was trained with: it is asked, merged and measured with that one."""

from __future__ import annotations

from pathlib import Path

from ..errors import MixLoraError
from ..llava_package import LlavaPackage, is_llava, use, used
from .adapter_record import RECORD, read_record


def use_its_llava(model_path: str | Path) -> None:
    """Use the package that a model's record names, if it has one and that names any.

    Raises:
        MixLoraError: it is not installed, or is no LLaVA.
    """
    package = _recorded(model_path)
    if package is None or package == used().name:
        return
    if not (package.isidentifier() and is_llava(package)):
        raise MixLoraError(
            f"{model_path}: its {RECORD} says that {package[:100]!r} trained it, and no LLaVA of that name is "
            "installed here; install that fork, or put its folder on PYTHONPATH"
        )
    use(LlavaPackage(package))


def check_is_its_llava(model_path: str | Path) -> None:
    """Refuse to load an adapter with another LLaVA than trained it, as a program of that one would.

    Raises:
        MixLoraError: its record names another package than the one that is used.
    """
    package = _recorded(model_path) or used().name
    if package != used().name:
        raise MixLoraError(
            f"{model_path}: its {RECORD} says that {package[:100]!r} trained it, and {used().name} is about to load "
            f"it; expected a program of {package[:100]!r}, such as llava-mixlora run -m {package[:100]}.serve.cli"
        )


def _recorded(model_path: str | Path) -> str | None:
    record = read_record(model_path)
    return None if record is None else record.package
