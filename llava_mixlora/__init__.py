"""MixLoRA (Shen et al., ACL 2024) as a PEFT method, and as a plugin for LLaVA.

Importing this package registers the PEFT type `MIXLORA` and changes nothing else; what LLaVA needs is applied by
`llava_mixlora.patches.apply()`, which `llava-mixlora run` calls.
"""

import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any, NoReturn

from .errors import MixLoraError

__all__ = ["MixLoraConfig", "MixLoraError", "MixLoraLayer", "MixLoraModel"]
__version__ = version("llava-mixlora")

import_error: Exception | None = None
"""Why the method could not be imported: `llava-mixlora doctor`, which tells what is missing, has to start then too."""

try:
    # Older accelerate imports DeepSpeed, which logs to the standard output, where programs read `doctor --json`.
    with redirect_stdout(sys.stderr):
        from .method.config import MixLoraConfig
        from .method.layer import MixLoraLayer
        from .method.model import MixLoraModel
        from .method.registration import KNOWS_NO_OTHER_TYPE, register

    register(MixLoraConfig, MixLoraModel)
    if KNOWS_NO_OTHER_TYPE:
        from .patches import peft_save_and_load

        for patch in peft_save_and_load.PATCHES:
            patch.apply()
except Exception as error:  # what an installation in pieces raises can be anything
    import_error = error

    def __getattr__(name: str) -> Any:
        if name in __all__:
            _raise_import_error(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def _raise_import_error(name: str) -> NoReturn:
        raise ImportError(f"{__name__}.{name}: {import_error}; `llava-mixlora doctor` tells more") from import_error
