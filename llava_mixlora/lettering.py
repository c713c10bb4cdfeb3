"""Names of other people in pictures."""

from __future__ import annotations


def literal(name: str) -> str:
    """A name for matplotlib, which takes what stands between two dollar signs for a formula."""
    return name.replace("$", r"\$")
