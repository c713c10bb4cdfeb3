"""Optional packages, asked for by name when they are first needed."""

import importlib
from types import ModuleType


def require(module: str, requirement: str) -> ModuleType:
    """Import ``module``, or end the program with exit code 1 and one line that says how to install it.

    Args:
        module: dotted import name, for example ``sklearn.datasets``.
        requirement: what pip installs it from, for example ``scikit-learn``.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            # Installed, but itself broken: the traceback is what helps then.
            raise
        raise SystemExit(f"The package {requirement!r} is missing: run `pip install {requirement}`") from None
