"""Files that messages name: they lie in the repository's `scripts/`, and travel with an installed package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
MAIN_JOB = Path("scripts", "finetune_mixlora.sh")


def repository() -> Path | None:
    """The clone that this package is imported from; None where the package alone was installed."""
    root = PACKAGE.parent
    return root if (root / MAIN_JOB).is_file() else None


def shipped(name: str) -> Path:
    """Where `zero2.json`, `constraints.txt` or another setting of `scripts/` lies here, as it can be typed."""
    root = repository()
    if root == Path.cwd():
        return Path("scripts", name)
    return (root or PACKAGE) / "scripts" / name
