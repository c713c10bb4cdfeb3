"""A `torch` for modules that load what strangers have pickled: its `load` runs none of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from llava_mixlora.adapters.pickles import read_state_dict


class _WeightsOnly(ModuleType):
    """Another module, but for `load`."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def load(self, file: Any, *_: Any, **__: Any) -> Any:
        """A state dict's tensors, on the CPU, which is where upstream asks for them.

        Raises:
            MixLoraError: the file holds code, or is damaged.
        """
        return read_state_dict(Path(file))


def weights_only(original: ModuleType) -> ModuleType:
    """`torch` as the module `original` is, but for files of which only tensors are read."""
    return _WeightsOnly(original)
