"""Heat maps of one number per layer and head, as plain values that ``heatmap.html.j2`` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log

import matplotlib
from matplotlib.colors import to_hex

_CELL = 14.0
_LEFT, _BOTTOM = 30.0, 26.0
_MOST_LABELS = 16


@dataclass(frozen=True)
class Scale:
    """What the colours mean: ``cividis``, whose lightness rises steadily for all kinds of colour vision.

    Attributes:
        low, high: the ends as text. unit: of the numbers. colors: of the ramp, from low to high.
    """

    low: str
    high: str
    unit: str
    colors: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Cell:
    """A coloured rectangle with a tooltip."""

    x: float
    y: float
    width: float
    height: float
    color: str
    text: str


@dataclass(frozen=True)
class Tick:
    """A label of an axis."""

    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True)
class HeatMap:
    """Layers across, heads down."""

    title: str
    description: str
    width: float
    height: float
    cells: tuple[Cell, ...]
    ticks: tuple[Tick, ...]


Values = Mapping[int, Sequence[float] | None]
"""One number per head, by layer index; ``None`` where a layer has none."""


def heat_maps(
    values: Mapping[str, Values], *, what: str, unit: str, write: Callable[[float], str], logarithmic: bool = False
) -> tuple[list[HeatMap], Scale]:
    """A map for each title, all with the same colours.

    Args:
        values: by title.
        what: the numbers, in a few words. unit: of them.
        write: a number as text.
        logarithmic: colours follow the logarithm.
    """
    every = [number for rows in values.values() for row in rows.values() for number in row or ()]
    positive = [number for number in every if number > 0]
    if logarithmic and positive:
        low, high = min(positive), max(positive)
    else:
        low, high = min(every, default=0.0), max(every, default=1.0)

    def place(number: float) -> float:
        if high <= low:
            return 0.5
        if logarithmic and positive:
            return log(max(number, low) / low) / log(high / low)
        return (number - low) / (high - low)

    palette = matplotlib.colormaps["cividis"]
    scale = Scale(
        low=write(low),
        high=write(high),
        unit=unit + (", logarithmic" if logarithmic else ""),
        colors=tuple(to_hex(palette(step / 8)) for step in range(9)),
        description=f"Colours from {write(low)}, dark, to {write(high)}, light",
    )
    maps = [_heat_map(title, rows, what, write, lambda n: to_hex(palette(place(n)))) for title, rows in values.items()]
    return maps, scale


def _heat_map(
    title: str, rows: Values, what: str, write: Callable[[float], str], color: Callable[[float], str]
) -> HeatMap:
    layers = sorted(rows)
    heads = max((len(row) for row in rows.values() if row is not None), default=0)
    cells = []
    for column, layer in enumerate(layers):
        for head, number in enumerate(rows[layer] or ()):
            where = f"layer {layer}, head {head}: {write(number)}"
            cells.append(Cell(_LEFT + column * _CELL, head * _CELL, _CELL, _CELL, color(number), where))
    below = heads * _CELL
    every = max(1, -(-len(layers) // _MOST_LABELS))
    ticks = [
        Tick(_LEFT + (column + 0.5) * _CELL, below + 11, "middle", str(layer))
        for column, layer in enumerate(layers)
        if column % every == 0
    ]
    every = max(1, -(-heads // _MOST_LABELS))
    ticks += [Tick(_LEFT - 4, (h + 0.5) * _CELL + 3.5, "end", str(h)) for h in range(0, heads, every)]
    width = _LEFT + max(1, len(layers)) * _CELL
    ticks.append(Tick(_LEFT + (width - _LEFT) / 2, below + 23, "middle", "layer"))
    ticks.append(Tick(1, below + 11, "start", "head"))
    return HeatMap(
        title=title,
        description=f"{what}, {title}: one cell for each of {len(layers)} layers and {heads} heads",
        width=max(width, 220.0),
        height=below + _BOTTOM,
        cells=tuple(cells),
        ticks=tuple(ticks),
    )
