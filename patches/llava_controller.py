"""`llava.serve.controller`: a controller that ends when it is told to."""

from __future__ import annotations

from .llava_model_worker import end_soon, in_the_background
from .patch import FAULT, Patch

MODULE = "llava.serve.controller"

PATCHES = (
    Patch(
        f"{MODULE}:heart_beat_controller",
        kind=FAULT,
        why="its thread never ends, and Ctrl-C waits for it",
        replace=in_the_background,
        program=True,
    ),
    Patch(
        f"{MODULE}:uvicorn",
        kind=FAULT,
        why="Ctrl-C waits for every answer that is under way, and for clients that have stopped reading theirs",
        replace=end_soon,
        program=True,
    ),
)
