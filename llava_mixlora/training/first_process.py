"""What the first of a run's processes decides for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from ..errors import MixLoraError

T = TypeVar("T")


def decided_by_first(is_first: bool, decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them, which have to call this together.

    Raises:
        MixLoraError: as `decide`, in the first process; the others end with status 1, as it says why.
    """
    found: list = [None, False]
    problem = None
    if is_first:
        try:
            found = [decide(), False]
        except MixLoraError as error:
            found, problem = [None, True], error
    broadcast_object_list(found)
    if problem is not None:
        raise problem
    if found[1]:
        raise SystemExit(1)
    return found[0]
