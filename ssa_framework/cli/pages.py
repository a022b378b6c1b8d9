"""What the HTML pages of the commands share: their templates, and figures for light and dark backgrounds."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure


def render(template: str, **values: Any) -> str:
    """One page from ``cli/templates``; a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("ssa_framework.cli"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Picture:
    """One figure as two data URIs, and its text for those who don't see it."""

    light: str
    dark: str
    description: str


def draw(paint: Callable[[], Figure], description: str) -> Picture:
    """Render ``paint()`` on both backgrounds."""
    return Picture(_render(paint, "#1b1f24"), _render(paint, "#e6e8eb"), description)


def _render(paint: Callable[[], Figure], ink: str) -> str:
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.facecolor": "#ffffff" if ink < "#8" else "#1b1f24",
        "legend.framealpha": 0.85,
        "grid.color": "#808080",
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "svg.hashsalt": "ssa",
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        paint().savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
