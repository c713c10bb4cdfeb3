"""The sets of versions that this project is tested with; `scripts/constraints*.txt` install them."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "deepspeed": "0.19.8"}


@dataclass(frozen=True)
class Stack:
    """One set.

    Args:
        name: as messages call it.
        constraints: the file of pip constraints in `scripts/` that installs it.
        versions: of each package, by its name in the package index.
    """

    name: str
    constraints: str
    versions: dict[str, str]


STACKS: tuple[Stack, ...] = (
    Stack(
        "default",
        "constraints.txt",
        {"transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", **COMMON},
    ),
    Stack(
        "transformers 4.57",
        "constraints-transformers-4.57.txt",
        {"transformers": "4.57.6", "peft": "0.21.2", "accelerate": "1.15.0", **COMMON},
    ),
    Stack(  # LLaVA-NeXT's
        "transformers 4.40",
        "constraints-transformers-4.40.txt",
        {"transformers": "4.40.2", "peft": "0.13.2", "accelerate": "0.29.3", **COMMON},
    ),
    Stack(  # LLaVA's own pins, but for torch, and for PEFT, of which it knows no later version than this
        "transformers 4.37",
        "constraints-transformers-4.37.txt",
        {"transformers": "4.37.2", "peft": "0.13.2", "accelerate": "0.21.0", **COMMON},
    ),
)
"""The default comes first."""

PEFT_BESIDE = tuple(f"0.{minor}" for minor in range(13, 22))
"""The series of PEFT that the method was run with (`scripts/test_peft.sh`), whatever stack is nearest."""


def nearest(found: dict[str, str | None]) -> Stack:
    """The stack that most of the `found` versions belong to, transformers' above all; the default where none does.

    Args:
        found: version of each package, None where it is missing. A local part such as `+cpu` does not count.
    """

    def agreement(stack: Stack) -> tuple[bool, int]:
        transformers = release_series(found.get("transformers")) == release_series(stack.versions["transformers"])
        return transformers, len(stack.versions) - len(differences(stack, found))

    return max(STACKS, key=agreement)


def differences(stack: Stack, found: dict[str, str | None]) -> list[str]:
    """The packages of a stack that are missing or of another version."""
    return [name for name, version in stack.versions.items() if (found.get(name) or "").partition("+")[0] != version]


def release_series(version: str | None) -> str | None:
    """`4.57` of `4.57.6`."""
    return None if version is None else ".".join(version.split(".")[:2])
