"""What this machine and its Python environment have, tried out rather than believed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import import_error
from ..llava_package import TRAIN, LlavaPackage, llavas_beside, use, used
from ..llava_version import distribution_of, hidden_copies, of_copies, origin
from ..shipped import repository
from .stacks import STACKS, differences, nearest

# What the plugin and LLaVA import besides the packages of a stack, by what pip installs it from.
SMALL_REQUIREMENTS = {
    "aenum": "aenum",
    "packaging": "packaging",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "einops": "einops",
    "sentencepiece": "sentencepiece",
    "shortuuid": "shortuuid",
    "google.protobuf": "protobuf",
    "requests": "requests",
    "PIL": "Pillow",
}
OF_FORKS = {
    **{name: name for name in ("av", "decord", "timm", "torchvision", "trl")},
    "cv2": "opencv-python-headless",
}
"""What LLaVA itself does without, and some forks import."""
PLOTS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}
PLAYGROUND = {"easy_vqa": "easy-vqa==1.0", **PLOTS}
SERVING = {"fastapi": "fastapi", "uvicorn": "uvicorn", "requests": "requests"}
LMMS_EVAL = {
    name: name for name in ("datasets", "evaluate", "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity")
}
PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "llava-torch", "deepspeed", "bitsandbytes"),
    *("flash-attn", "lmms-eval", "tokenizers", "numpy"),
)
"""Whose versions are told, by their names in the package index."""
OF_UPSTREAM = ("llava-torch", "llava_torch")
INSTALL_LLAVA = "pip install --no-deps llava-torch==1.2.2.post1"
WAITING = "not tried without"
"""How the finding of a part begins that another part has to be mended for."""


@dataclass(frozen=True)
class Part:
    """Something that features need.

    Args:
        works: whether it does its work here.
        found: what was seen, in one line.
        mend: the command that makes it work; None where it works, where another part has to be mended first, and where
            no command helps.
    """

    works: bool
    found: str
    mend: str | None = None


def versions() -> dict[str, str | None]:
    """The installed versions of `PACKAGES`; None where one is missing or hidden."""
    return {package: _version(package) for package in PACKAGES}


def parts() -> dict[str, Part]:
    """Everything that features need, each tried out once; prints nothing and raises nothing. A few seconds.

    The LLaVA among them is the one that this process uses.
    """
    with _quiet():
        return dict(_try_parts())


def _try_parts() -> Iterator[tuple[str, Part]]:
    pins = nearest(versions()).versions
    done: dict[str, Part] = {}

    def keep(name: str, part: Part) -> tuple[str, Part]:
        done[name] = part
        return name, part

    def after(needs: Sequence[str], attempt: Callable[[], Part]) -> Part:
        waits_for = next((name for name in needs if not done[name].works), None)
        return Part(False, f"{WAITING} {waits_for}") if waits_for else attempt()

    def package(name: str, needs: Sequence[str] = ()) -> tuple[str, Part]:
        return keep(name, after(needs, lambda: _package(name, f"pip install {name}=={pins[name]}")))

    yield package("torch")
    yield package("transformers", ["torch"])
    yield package("accelerate", ["torch"])
    yield package("peft", ["torch", "transformers", "accelerate"])
    yield keep("small requirements", _packages(SMALL_REQUIREMENTS))
    yield keep("MixLoRA", after(["peft", "small requirements"], _method))
    yield keep("LLaVA", after(["MixLoRA"], _llava))
    yield keep("patches", after(["LLaVA"], _patches))
    yield keep("LLaVA's training", after(["patches"], _training))
    yield package("deepspeed", ["torch"])
    yield keep("GPU", after(["torch"], _gpu))
    yield keep("compiler", _compiler())
    yield keep("nvcc", after(["torch"], _nvcc))
    yield package("bitsandbytes", ["torch"])
    for bits in (4, 8):
        yield keep(f"{bits}-bit weights", after(["bitsandbytes"], lambda bits=bits: _quantized(bits)))
    yield keep("flash-attn", after(["torch", "transformers"], _flash_attention))
    if repository() is not None:
        yield keep("playground's packages", _packages(PLAYGROUND))
    yield keep("plotting packages", _packages(PLOTS))
    yield keep("serving packages", _packages(SERVING))
    yield keep("lmms-eval", _lmms_eval())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # What packages say on being imported or patched would hide the one screen. Some of them write past sys.stderr, or
    # log to what it was when they were imported.
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        kept = []
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            kept.append((descriptor, os.dup(descriptor)))
            os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor, copy in kept:
                os.dup2(copy, descriptor)
                os.close(copy)


def _version(package: str) -> str | None:
    if package == "llava-torch":
        folder = used().folder
        # Installed or not, it is not what runs where another LLaVA hides it or is to be run.
        installed = distribution_of(used().name, folder) if folder is not None else None
        return installed.version if installed is not None and installed.name in OF_UPSTREAM else None
    modules = {"flash-attn": "flash_attn", "lmms-eval": "lmms_eval"}
    if not _is_there(modules.get(package, package)):
        return None
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "unknown"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _failure(attempt: Callable[[], Any]) -> str | None:
    """What calling it raises, in one line."""
    try:
        attempt()
    except (Exception, SystemExit) as error:  # a package in pieces can raise anything
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _package(name: str, mend: str) -> Part:
    if not _is_there(name):
        return Part(False, "not installed", mend)
    if (reason := _failure(lambda: importlib.import_module(name))) is not None:
        return Part(
            False, f"installed, but cannot be imported: {reason}", mend.replace("install", "install --force-reinstall")
        )
    return Part(True, str(_version(name)))


def _packages(requirements: dict[str, str]) -> Part:
    missing = [requirement for module, requirement in requirements.items() if not _is_there(module)]
    if missing:
        return Part(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Part(True, ", ".join(requirements.values()))


def _install_stack() -> str | None:
    """The command for the nearest tested versions, unless they are what is installed."""
    found = versions()
    stack = nearest(found)
    together = [name for name in differences(stack, found) if name in ("transformers", "peft", "accelerate", "torch")]
    if not together:
        return None
    return "pip install " + " ".join(f"{name}=={stack.versions[name]}" for name in together)


def _method() -> Part:
    if import_error is not None:
        reason = _failure(_raise_import_error)
        default = " ".join(f"{name}=={STACKS[0].versions[name]}" for name in ("transformers", "peft", "accelerate"))
        return Part(False, f"cannot be imported: {reason}", _install_stack() or f"pip install {default}")
    return Part(True, "registered with PEFT")


def _raise_import_error() -> None:
    raise import_error


def _llava() -> Part:
    package = used()
    if package.folder is None:
        others = llavas_beside(installed=True)
        there = f"; {', '.join(others)} can be judged by --package" if others else ""
        return Part(False, f"{package.name} is not installed{there}", None if others else INSTALL_LLAVA)
    found = f"{package.name} in {origin(package.name)}"
    if hidden := hidden_copies(package.name):
        found += f"; warning: it {of_copies(package.name, hidden)}"
    others = [name for name in llavas_beside() if name != package.name]
    if others:
        found += f"; beside it {', '.join(others)}, judged by --package {others[0]}"
    return Part(True, found)


def _patches() -> Part:
    from .. import patches

    if (reason := _failing(patches.apply, used().name)) is not None:
        return Part(False, reason, _mend_llava(reason))
    applied = sum(patch.applied for patch in patches.PATCHES)
    return Part(True, f"{applied} fit the installed LLaVA and are applied where it is run")


def _training() -> Part:
    """Whether the LLaVA can train, of which those that are only asked need nothing."""
    from .. import patches

    package = used()
    if (module := package.module(TRAIN)) is None:
        place = f"{package.name}, in {package.folder},"
        return Part(False, f"{place} has no module with train() and TrainingArguments: it can be asked, not trained")
    reason = _failing(patches.apply, package.name, module)
    return Part(True, f"{module}, with flags for LoRA") if reason is None else Part(False, reason, _mend_llava(reason))


def _failing(attempt: Callable[[], Any], name: str, *runs: str) -> str | None:
    """As [`_failure`], of what is to be run of a LLaVA."""
    before = used()
    use(LlavaPackage(name, runs))
    try:
        return _failure(attempt)
    finally:
        use(before)


def _mend_llava(reason: str) -> str | None:
    """What to do where LLaVA does not fit: PyPI's may be damaged, a fork is never replaced by it."""
    folder = used().folder
    installed = None if folder is None else distribution_of(used().name, folder)
    is_upstream = installed is not None and installed.name in OF_UPSTREAM and "site-packages" in folder.parts
    if not is_upstream:
        missing = re.search(r"No module named '(\w+)", reason)
        requirement = {**SMALL_REQUIREMENTS, **OF_FORKS}.get(missing[1]) if missing else None
        return f"pip install {requirement}" if requirement else None
    return _install_stack() or INSTALL_LLAVA.replace("install", "install --force-reinstall")


def _gpu() -> Part:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return Part(True, f"{names}; {runtime}, driver {_driver() or 'unknown'}")
    if (driver := _driver()) is None:
        return Part(False, "none: everything runs on the CPU")
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    return Part(
        False,
        f"there is one (driver {driver}), but PyTorch {torch.__version__}, built {built}, does not see it",
        f"pip install --force-reinstall torch=={STACKS[0].versions['torch']}",
    )


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _compiler() -> Part:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return Part(False, "no C++ compiler (c++, g++) on the PATH", "sudo apt install g++ python3-dev")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("#include <Python.h>\n#include <omp.h>\n")
        words = ["-fopenmp", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source)]
        done = subprocess.run([compiler, *words, "-o", str(source.with_suffix(".so"))], capture_output=True, text=True)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        return Part(False, f"{compiler} compiles no Python extension: {reason}", "sudo apt install g++ python3-dev")
    if shutil.which("ninja") is None:
        return Part(False, f"{compiler}, but no ninja on the PATH", "pip install ninja")
    return Part(True, f"{compiler}, ninja")


def _nvcc() -> Part:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return Part(True, "not needed without an NVIDIA GPU")
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        toolkit = f"sudo apt install cuda-toolkit-{torch.version.cuda.replace('.', '-')}"
        return Part(False, "no nvcc: DeepSpeed cannot compile its CUDA operations", toolkit)
    return Part(True, f"{CUDA_HOME}/bin/nvcc")


def _quantized(bits: int) -> Part:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst = 0.0

    def compare() -> None:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        nonlocal worst
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 64, generator=generator)
        x = torch.randn(4, 64, generator=generator).to(device, torch.bfloat16)
        if bits == 4:
            layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        else:
            layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight}, strict=False)
        with torch.inference_mode():
            exact = x.float() @ weight.to(device).T
            worst = ((layer.to(device)(x).float() - exact).norm() / exact.norm()).item()

    mend = f"pip install --force-reinstall --no-deps bitsandbytes=={STACKS[0].versions['bitsandbytes']}"
    if (reason := _failure(compare)) is not None:
        return Part(False, f"a layer does not run on {device}: {reason}", mend)
    if not worst < 0.2:
        return Part(False, f"a layer on {device} is off by {worst:.0%}", mend)
    return Part(True, f"a layer on {device} is within {worst:.1%} of its 16-bit original")


def _flash_attention() -> Part:
    import torch
    from transformers.utils import is_flash_attn_2_available

    mend = "pip install flash-attn --no-build-isolation"
    if not torch.cuda.is_available():
        installed = "installed" if _is_there("flash_attn") else "not installed"
        return Part(False, f"{installed}; it needs a GPU, and PyTorch's own attention (SDPA) is used instead")
    if not _is_there("flash_attn"):
        return Part(False, "not installed: PyTorch's own attention (SDPA) is used instead", mend)
    if not is_flash_attn_2_available():
        return Part(False, "installed, but transformers cannot use it", mend + " --upgrade")

    def attend() -> None:
        from flash_attn import flash_attn_func

        q = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
        flash_attn_func(q, q, q, causal=True)
        torch.cuda.synchronize()

    if (reason := _failure(attend)) is not None:
        return Part(False, f"installed, but does not run: {reason}", mend + " --force-reinstall --no-deps")
    return Part(True, f"{_version('flash-attn')}, runs on this GPU")


def _lmms_eval() -> Part:
    needed = _packages(LMMS_EVAL)
    if _is_there("lmms_eval"):
        return needed if not needed.works else Part(True, str(_version("lmms-eval")))
    itself = "pip install --no-deps lmms-eval==0.7.3"
    return Part(False, "not installed", itself if needed.works else f"{itself} && {needed.mend}")
