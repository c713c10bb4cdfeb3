"""`llava-mixlora doctor`: what works here, and what mends the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__, import_error
from ..errors import MixLoraError
from ..shipped import repository, shipped
from . import environment
from .environment import Part
from .package_flag import add_package, use_package
from .stacks import PEFT_BESIDE, STACKS, Stack, differences, nearest, release_series

LOADING = ("torch", "transformers", "accelerate", "peft", "small requirements", "MixLoRA", "LLaVA", "patches")
TRAINING = (
    *LOADING,
    "LLaVA's training",
    "deepspeed",
)  # upstream's train() imports it to save an adapter, with or without --deepspeed
MAIN_JOB = "main job"
FEATURES = {
    MAIN_JOB: (*TRAINING, "playground's packages"),
    "training": TRAINING,
    "QLoRA, 4 bits": (*TRAINING, "bitsandbytes", "4-bit weights"),
    "QLoRA, 8 bits": (*TRAINING, "bitsandbytes", "8-bit weights"),
    "DeepSpeed, ZeRO": (*TRAINING, "compiler", "nvcc"),
    "training on a GPU": (*TRAINING, "GPU"),
    "flash attention": ("torch", "transformers", "flash-attn"),
    "evaluation": LOADING,
    "evaluation plots": ("plotting packages",),
    "lmms-eval": (*LOADING, "lmms-eval"),
    "serving": (*LOADING, "serving packages"),
}
"""What users do, and the parts (`environment.parts`) that it needs."""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Describe the command `doctor` to its parser."""
    parser.description = (
        "Tell which versions are installed, what works with them on this machine, and the command that mends what does "
        "not. Status 1: the main job (scripts/finetune_mixlora.sh) cannot run, or where this package was installed "
        "without its repository, training cannot. With --estimate, tell before a run how many parameters it trains and "
        "how much memory it needs on each GPU, for 16, 8 and 4 bits and every ZeRO stage. No weights are loaded."
    )
    parser.epilog = (
        "example: llava-mixlora doctor; "
        "llava-mixlora doctor --estimate liuhaotian/llava-v1.5-7b --batch-size 4 --gpus 8"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    add_package(parser)
    parser.add_argument(
        "--estimate", metavar="MODEL_CONFIG", help="model folder, config.json, or name on the hub; for the flags below"
    )
    before = set(vars(parser.parse_args([])))
    parser.add_argument("--bits", type=int, help="16, 8 or 4: only that (default: all three)")
    parser.add_argument("--num-factors", type=int, default=16, help="factors in each pool (16)")
    parser.add_argument("--r", type=int, default=4, help="factors chosen per instance (4)")
    parser.add_argument("--lora-dropout", type=float, default=0.05, help="dropout on the input of pool A (0.05)")
    parser.add_argument("--pairing", help="same (default; rank with ifs_cfs), or rank, which has two routers")
    parser.add_argument("--routing", help="ifs (default; ifs_cfs with --pairing rank), ifs_cfs or random")
    parser.add_argument("--router-gradient", default="straight_through", help="straight_through (default) or none")
    parser.add_argument("--router-input", help="words (default) or hidden")
    parser.add_argument("--cfs", default="weights", help="what CFS trains: weights (default) or table")
    parser.add_argument("--batch-size", type=int, default=16, help="instances per GPU and step (16)")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, help="tokens of an instance, those of its image included (2048)"
    )
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="on by default"
    )
    parser.add_argument("--gpus", type=int, default=1, help="over which ZeRO divides (1)")
    parser.add_argument("--optimizer", default="adamw", help="adamw (default) or paged_adamw_8bit")
    parser.add_argument("--compute-dtype", default="bf16", help="bf16 (default) or fp32")
    parser.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder or name of the CLIP tower; none: text only (default: the model's)",
    )
    describing = {name: value for name, value in vars(parser.parse_args([])).items() if name not in before}
    parser.set_defaults(describing=describing, command=_doctor)


def _doctor(given: argparse.Namespace) -> int:
    use_package(given)
    if given.estimate is not None:
        check_imported()
        _estimate(given)
        return 0
    for name, default in given.describing.items():
        if getattr(given, name) != default:
            flag = "--" + name.replace("_", "-")
            raise MixLoraError(f"{flag} {getattr(given, name)} describes a run for --estimate MODEL, which is missing")
    examination = examine()
    print(json.dumps(examination.as_json(), indent=1) if given.json else "\n".join(examination.lines()))
    return 0 if examination.main_job else 1


def _estimate(given: argparse.Namespace) -> None:
    # Here, since `doctor` has to start where torch is missing.
    from .memory_estimate import BITS, RunSettings, estimate, read_model_config
    from .memory_report import as_json, describe

    settings = RunSettings(**{field.name: getattr(given, field.name) for field in dataclasses.fields(RunSettings)})
    bits = BITS if given.bits is None else (given.bits,)
    result = estimate(read_model_config(given.estimate, given.vision_tower), settings, bits)
    if given.json:
        print(json.dumps(as_json(given.estimate, result), indent=1))
    else:
        print("\n".join(describe(given.estimate, result)))


def check_imported() -> None:
    """Refuse to go on where the method could not be imported.

    Raises:
        MixLoraError: with the reason, in one line.
    """
    if import_error is not None:
        reason = (str(import_error).splitlines() or [type(import_error).__name__])[0]
        raise MixLoraError(f"{reason}; `llava-mixlora doctor` tells what is missing and the command that mends it")


@dataclass(frozen=True)
class Examination:
    """What was found.

    Args:
        versions: of each package, None where it is missing.
        parts: by name, as `environment.parts` gives them.
    """

    versions: dict[str, str | None]
    parts: dict[str, Part]

    @property
    def stack(self) -> Stack:
        """The tested stack that is nearest to the installed versions."""
        return nearest(self.versions)

    @property
    def features(self) -> list[str]:
        """Those of `FEATURES` that are here: the main job belongs to the repository, which a package is without."""
        return [feature for feature in FEATURES if feature != MAIN_JOB or repository() is not None]

    @property
    def main_job(self) -> bool:
        """Whether `bash scripts/finetune_mixlora.sh` can run; without its repository, whether training can."""
        return self.works(self.features[0])

    def works(self, feature: str) -> bool:
        """Whether every part that the feature needs works."""
        return not self.broken(feature)

    def broken(self, feature: str) -> dict[str, Part]:
        """The parts that keep a feature from working; not those that merely wait for another one."""
        broken = {name: self.parts[name] for name in FEATURES[feature] if not self.parts[name].works}
        return {name: part for name, part in broken.items() if not part.found.startswith(environment.WAITING)} or broken

    def mends(self, feature: str) -> list[str]:
        """The commands that make a feature work, in the order in which to run them."""
        return list(dict.fromkeys(part.mend for part in self.broken(feature).values() if part.mend is not None))

    def lines(self) -> Iterator[str]:
        """The screen that `llava-mixlora doctor` prints."""
        yield f"llava-mixlora {__version__}, Python {platform.python_version()} in {sys.prefix} on {platform.system()}"
        yield ""
        yield f"{'version':<16}{'found':<16}" + "".join(f"{stack.name:<20}" for stack in STACKS).rstrip()
        for package, found in self.versions.items():
            tested = "".join(f"{stack.versions.get(package, ''):<20}" for stack in STACKS)
            yield f"  {package:<14}{found or '-':<16}{tested}".rstrip()
        yield self._stack_line()
        yield ""
        yield "what is here"
        for name, part in self.parts.items():
            if name not in self.versions or not part.works or name == "flash-attn":
                yield f"  {name:<24}{part.found}"
        yield ""
        yield "what works"
        for feature in self.features:
            if self.works(feature):
                yield f"  yes  {feature}"
                continue
            yield f"  no   {feature}: " + ", ".join(self.broken(feature))
            mends = self.mends(feature) or ["no command does; see above"]
            yield from (f"         mend: {mend}" for mend in mends)

    def _stack_line(self) -> str:
        stack = self.stack
        other = [
            f"{name} ({self.versions[name] or 'missing'}, tested: {stack.versions[name]}{self._also(name)})"
            for name in differences(stack, self.versions)
        ]
        if not other:
            return f'These are the versions of the tested stack "{stack.name}".'
        return f'Nearest to the tested stack "{stack.name}", but for {", ".join(other)}: {shipped(stack.constraints)}'

    def _also(self, name: str) -> str:
        series = release_series(self.versions[name])
        return f", and the method with {series} too" if name == "peft" and series in PEFT_BESIDE else ""

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "llava_mixlora": __version__,
            "python": platform.python_version(),
            "versions": self.versions,
            "nearest_stack": self.stack.name,
            "differs_from_stack": differences(self.stack, self.versions),
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "features": {
                feature: {
                    "works": self.works(feature),
                    "broken": list(self.broken(feature)),
                    "mend": self.mends(feature),
                }
                for feature in self.features
            },
        }


def examine() -> Examination:
    """Look at this environment, which takes a few seconds."""
    return Examination(environment.versions(), environment.parts())
