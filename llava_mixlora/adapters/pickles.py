"""Files that PyTorch has pickled: read without executing code, and searched for code before others read them.

A pickle is a program, which can call whatever Python can import. PyTorch runs only what rebuilds tensors when it is
asked for weights only; before 2.6 that had to be asked for, and DeepSpeed asks for more.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import MixLoraError
from ..limits import limits

CHUNK = 1 << 22  # bytes read at once while a checksum is verified
REBUILDING = frozenset(
    {
        *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter", "qtensor")),
        *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_device_tensor_from_numpy"),
        *("torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout", "torch.device", "torch.Size"),
        *("torch.Tensor", "torch.nn.parameter.Parameter", "collections.OrderedDict", "collections.defaultdict"),
        *("collections.Counter", "_codecs.encode", "builtins.set", "builtins.frozenset", "builtins.slice"),
        *("builtins.bytearray", "builtins.complex", "__builtin__.set", "__builtin__.bytearray"),
        *("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.bool", "builtins.str"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray", "numpy.dtype"),
        *("datetime.timedelta", "argparse.Namespace"),
        *("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
        *("deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum"),
    }
)
"""What the states of optimizers, schedulers, random generators and of DeepSpeed are made with; none of it acts."""
STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING")
WIDE = "a name that it puts together while it is read"


def read_pickle(file: Path, verify: bool = False) -> Any:
    """What a file holds, where that is nothing but numbers in tensors, texts, and lists and dictionaries of them.

    `verify`: compare with the checksums that are in the file, which reads all of it once more.

    Raises:
        MixLoraError: it holds code, which is named and was not executed, or it is damaged.
    """
    try:
        is_zip = _is_zip(file)
        if is_zip and verify:
            verify_checksums(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle fails in many ways
        refuse_code(file)
        raise MixLoraError(f"{file} is damaged ({_reason(error)}); copy it again") from error


def read_state_dict(file: Path, verify: bool = False) -> dict[str, Tensor]:
    """The tensors in a file, by name. `verify`: as in [`read_pickle`].

    Raises:
        MixLoraError: as [`read_pickle`], or it holds something else.
    """
    state = read_pickle(file, verify)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise MixLoraError(f"{file}: expected a state dict of tensors by name, got {_described(state)}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise MixLoraError(f"{file}: {name[:200]!r} is larger than what the file holds of it; copy it again")
    return state


class TensorsOnly(ModuleType):
    """`torch` for a module that loads what strangers have pickled: its `load` gives tensors, and runs nothing.

    They come on the CPU, which is where LLaVA asks for them. All else is `torch` itself.
    """

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def load(self, file: str | Path, *_: Any, **__: Any) -> dict[str, Tensor]:
        """The tensors in a file, by name.

        Raises:
            MixLoraError: as [`read_state_dict`].
        """
        return read_state_dict(Path(file))


def refuse_code(file: Path) -> None:
    """Refuse a file that calls more than what rebuilds tensors; it is read like a text, and none of it is run.

    Raises:
        MixLoraError: names what it would call.
    """
    try:
        found = next((name for name in _named_in(file) if not _is_harmless(name)), None)
    except Exception as error:  # what cannot be followed to its end could hold anything
        raise MixLoraError(f"{file} is damaged ({_reason(error)}); copy it again") from error
    if found is not None:
        raise MixLoraError(
            f"{file} holds code ({found[:100]!r}), which was not executed; a file of weights needs none, so do not use "
            "it, and ask where it comes from"
        )


def verify_checksums(file: Path) -> None:
    """Read a zip file and compare it with its checksums; `torch.load` verifies none.

    Raises:
        zipfile.BadZipFile: a checksum is another one.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as record:
                while record.read(CHUNK):
                    pass


def _is_harmless(name: str) -> bool:
    if name in REBUILDING:
        return True
    module, _, last = name.rpartition(".")
    owner = {"torch": torch, "torch.storage": torch.storage}.get(module)
    value = getattr(owner, last, None)
    is_dtype = isinstance(value, torch.dtype) or (isinstance(value, type) and last.endswith("Storage"))
    return is_dtype or (module == "numpy.dtypes" and last.endswith("DType"))


def _named_in(file: Path) -> Iterator[str]:
    """The dotted names that the pickles in a file import; a TorchScript program counts as one."""
    if _is_zip(file):
        with zipfile.ZipFile(file) as archive:
            if len(set(archive.namelist())) < len(archive.namelist()):
                raise ValueError("it holds two files of one name")
            for name in archive.namelist():
                if name.endswith((".py", "/constants.pkl")):
                    yield "a TorchScript program"
                if name.endswith(".pkl"):
                    with archive.open(name) as pickle:
                        yield from _imports(pickle)
        return
    with file.open("rb") as pickle:  # as before PyTorch 1.6: five pickles, then numbers
        for _ in range(5):
            yield from _imports(pickle)


def _is_zip(file: Path) -> bool:
    # As PyTorch tells: Python would also take a pickle with a zip file behind it for one.
    with file.open("rb") as start:
        return start.read(4) == b"PK\x03\x04"


def _imports(pickle: BinaryIO | Any) -> Iterator[str]:
    texts: list[str] = []  # the last ones pushed; STACK_GLOBAL takes two of them
    most = limits().pickle_operations
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if number > most:
            raise ValueError(f"a pickle of more than {most:,} steps")
        if operation.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".", 1)
        elif operation.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:]) if len(texts) >= 2 else WIDE
        elif operation.name in ("EXT1", "EXT2", "EXT4"):
            yield WIDE
        if operation.name in STRINGS:
            texts = [*texts[-1:], argument]
        elif operation.name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            texts = []  # a name could come from anywhere


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _described(state: Any) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    value = next((value for value in state.values() if not isinstance(value, Tensor)), None)
    return f"a dictionary with {type(value).__name__} in it" if value is not None else "a dictionary by other keys"
