"""`Store`: what a search measured, kept on disk, so that it can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssa_framework.errors import ConfigError
from ssa_framework.laboratory.files import replace_json


class Store:
    """What was measured, by name, in a JSON file that is replaced at once after every entry."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.values: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            try:
                self.values = dict(json.loads(self.path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ConfigError(f"{self.path} is no state of a search: {error}; remove it to begin anew") from error

    def belongs_to(self, run: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(run))
        held = self.values.setdefault("run", wanted)
        if held != wanted:
            different = [name for name in wanted if held.get(name) != wanted[name]]
            raise ConfigError(
                f"{self.path} holds what a search with another {', '.join(different)} measured; remove it, or keep the "
                f"state in another file"
            )

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.values:
            started = time.perf_counter()
            value = measure()
            self.put(name, value, time.perf_counter() - started)
        return self.values[name]

    def put(self, name: str, value: Any, seconds: float) -> None:
        self.values[name] = value
        self.values["seconds"] = round(self.values.get("seconds", 0.0) + seconds, 3)
        if self.path is not None:
            replace_json(self.path, self.values, indent=None, allow_nan=True)
