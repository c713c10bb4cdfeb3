"""`llava.serve.controller`: a controller that ends when it is told to."""

from __future__ import annotations

from .llava_model_worker import ends_when_told

PATCHES = ends_when_told("llava.serve.controller", "heart_beat_controller")
