"""What a long study has measured, kept in a file after each measurement, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playground.atomic import write_json


class Notes:
    """Measurements by name in a JSON file; those of a study with other settings are dropped."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.taken: dict[str, Any] = stored["taken"] if stored.get("settings") == settings else {}

    @classmethod
    def read(cls, file: Path) -> Notes:
        """The measurements in an existing file, whatever their settings."""
        return cls(file, json.loads(file.read_text(encoding="utf-8"))["settings"])

    def has(self, *names: str) -> bool:
        """Whether all of these have been measured."""
        return all(name in self.taken for name in names)

    def add(self, name: str, measured: Any) -> None:
        """Keep a measurement."""
        self.taken[name] = measured
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"settings": self.settings, "taken": self.taken})

    def take(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure, unless that was done before."""
        if name not in self.taken:
            self.add(name, measure())
            print(f"{name}: {self.taken[name]}", flush=True)
