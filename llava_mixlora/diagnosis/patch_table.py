"""`llava-mixlora patches`: every change that is made to upstream programs at run time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

from ..patches import OF_THE_METHOD, PATCHES, Patch, PatchError
from .package_flag import add_package, use_package


def add_patches(parser: argparse.ArgumentParser) -> None:
    """Describe the command `patches` to its parser."""
    parser.description = (
        "List every change that `llava-mixlora run` makes to upstream programs while it runs them; none of their files "
        "is edited. For each: what it replaces, of which kind it is (the method itself, compatibility with versions, a "
        "fault of upstream that is mended), the versions that need it, whether those installed do and whether it fits "
        "them, and why it is there. Status 1: one that is needed does not fit."
    )
    parser.epilog = "example: llava-mixlora patches"
    add_package(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_patches)


@dataclass(frozen=True)
class Row:
    """What is told of one patch.

    Args:
        target: the upstream symbol that it replaces.
        kind: of `patches.KINDS`.
        versions: the packages' versions that need it, `all` where it does not depend on them.
        needed: whether the installed versions do.
        fits: whether it can be applied here; None where it is not needed, or only looked for when its program is run.
        problem: why it does not fit; empty where it does.
        why: it is there.
    """

    target: str
    kind: str
    versions: str
    needed: bool
    fits: bool | None
    problem: str
    why: str

    @property
    def here(self) -> str:
        """`needed` and `fits` in a word or two."""
        if not self.needed:
            return "not needed"
        return {None: "when it is run", True: "fits", False: "DOES NOT FIT"}[self.fits]


def rows() -> list[Row]:
    """One for each patch, in the order in which they are applied; applies those that are not patches of programs."""
    return [_row(patch) for patch in (*OF_THE_METHOD, *PATCHES)]


def _row(patch: Patch) -> Row:
    problem = ""
    fits = None
    if patch.needed and not patch.program:
        try:
            patch.apply()  # for good: LLaVA can only be imported with what the patches before its own have put back
        except PatchError as error:
            problem = str(error)
        problem = problem or patch.problem or ""
        fits = not problem
    versions = ", ".join(f"{package} {wanted}" for package, wanted in patch.requires.items()) or "all"
    return Row(patch.target, patch.kind, versions, patch.needed, fits, problem, patch.why)


def lines(table: list[Row]) -> Iterator[str]:
    """The screen that `llava-mixlora patches` prints."""
    titles = Row("replaces", "kind", "versions", True, True, "", "")
    widths = [max(len(getattr(row, name)) for row in (titles, *table)) for name in ("target", "kind", "versions")]
    for row in (titles, *table):
        cells = (row.target, row.kind, row.versions)
        here = "here" if row is titles else row.here
        yield "  ".join((*(f"{cell:<{width}}" for cell, width in zip(cells, widths)), here))
        if row is not titles:
            yield f"    {row.problem or row.why}"
    needed = [row for row in table if row.needed]
    yield ""
    yield f"{len(table)} patches, {len(needed)} of them needed by the versions installed here"


def _patches(given: argparse.Namespace) -> int:
    use_package(given)
    table = rows()
    print(json.dumps([vars(row) for row in table], indent=1) if given.json else "\n".join(lines(table)))
    return 1 if any(row.fits is False for row in table) else 0
