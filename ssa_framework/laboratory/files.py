"""`replace_json`: a file that is either the one before or the whole new one, whenever a run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_json(path: str | Path, values: Any, *, indent: int | None = 1, allow_nan: bool = False) -> None:
    """Write ``values`` as JSON to ``path``, whose folder is made if it is missing, and replace the file at once.

    Raises:
        ValueError: NaN or infinity in ``values``, unless ``allow_nan``. OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(values, indent=indent, allow_nan=allow_nan) + "\n", encoding="utf-8")
    os.replace(beside, path)
