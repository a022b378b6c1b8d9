"""Models, texts and layers on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import typer

from ssa_framework.config import SSAConfig
from ssa_framework.errors import SSAError
from ssa_framework.laboratory.models import default_texts, read_texts
from ssa_framework.router import Router

TEXT_HELP = (
    f"A text file, or what every Python carries: {', '.join(map(repr, default_texts()))}. What it has beyond the "
    f"length is left out."
)
LAYERS_HELP = "Such as 0,5,10-14,-1; negative ones count from the end."


def pick_text(choice: str) -> tuple[str, str]:
    """Name and content of a built-in text or of a file.

    Raises:
        ConfigError: a file that cannot be read.
    """
    texts = default_texts()
    if choice in texts and not Path(choice).is_file():
        return choice, texts[choice]
    return next(iter(read_texts([choice]).items()))


def parse_layers(text: str | None, option: str = "--layers") -> list[int] | None:
    """``0,5,10-14,-1`` as numbers; ``None`` for ``None``.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and not 0 <= int(match[1]) <= int(match[2])):
            raise typer.BadParameter(
                f"expected numbers and ranges such as 0,5,10-14,-1, got {text!r}", param_hint=option
            )
        layers += [int(match[1])] if match[2] is None else range(int(match[1]), int(match[2]) + 1)
    return layers


def check_mixes(mixes: Mapping[str, SSAConfig], option: str = "--mix") -> None:
    """Find unknown sources and options before anything is read.

    Raises:
        typer.BadParameter: names the mix and what is wrong.
    """
    for name, config in mixes.items():
        try:
            for own in config.of_every_layer():
                Router(own)
        except SSAError as error:
            raise typer.BadParameter(f"mix {name!r}: {error}", param_hint=option) from error


def listed(names: Iterable[object]) -> str:
    """``a, b and c``."""
    words = [str(name) for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
