"""`llava-mixlora doctor`: what works here, and what mends the rest."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from . import environment
from .environment import Part
from .stacks import STACKS, Stack, differences, nearest

LOADING = ("torch", "transformers", "accelerate", "peft", "small requirements", "MixLoRA", "LLaVA", "patches")
TRAINING = (*LOADING, "deepspeed")  # upstream's train() imports it to save an adapter, with or without --deepspeed
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
    def main_job(self) -> bool:
        """Whether `bash scripts/finetune_mixlora.sh` can run."""
        return self.works(MAIN_JOB)

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
        for feature in FEATURES:
            if self.works(feature):
                yield f"  yes  {feature}"
                continue
            yield f"  no   {feature}: " + ", ".join(self.broken(feature))
            mends = self.mends(feature) or ["no command does; see above"]
            yield from (f"         mend: {mend}" for mend in mends)

    def _stack_line(self) -> str:
        stack = self.stack
        other = [
            f"{name} ({self.versions[name] or 'missing'}, tested: {stack.versions[name]})"
            for name in differences(stack, self.versions)
        ]
        if not other:
            return f'These are the versions of the tested stack "{stack.name}".'
        return f'Nearest to the tested stack "{stack.name}", but for {", ".join(other)}: scripts/{stack.constraints}'

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
                for feature in FEATURES
            },
        }


def examine() -> Examination:
    """Look at this environment, which takes a few seconds."""
    return Examination(environment.versions(), environment.parts())
