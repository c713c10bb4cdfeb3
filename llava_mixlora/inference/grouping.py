"""What fits into memory at a time."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")


def groups_within(sizes: dict[Key, int], most: int) -> list[list[Key]]:
    """The keys in their order, in groups whose sizes sum to `most` at most; a larger one has a group of its own."""
    groups: list[list[Key]] = [[]]
    held = 0
    for key, size in sizes.items():
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    return groups
