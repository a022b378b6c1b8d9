"""`plot_graph`: a neighbor graph as a picture, queries down and keys across."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ssa_framework.errors import GraphError

if TYPE_CHECKING:
    from ssa_framework.graph import NeighborGraph

PART_COLORS = {
    "span": "#56B4E9",
    "band": "#0072B2",
    "columns": "#E69F00",
    "slices": "#CC79A7",
    "listed": "#009E73",
}
"""Of the palette of Okabe and Ito (Color Universal Design, 2008), which colour-blind people can tell apart."""
MAX_CELLS = 512
"""Graphs with more queries or keys than this are drawn as density, several positions to a cell."""
_FUTURE = (0.5, 0.5, 0.5, 0.14)
_FAINTEST = 0.3  # opacity of a cell with a single edge: seen, but lighter than a full cell


def plot_graph(graph: NeighborGraph, *, batch: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """Draw the edges of one graph head.

    Each part of the graph has its colour; cells after the query are shaded where the graph is causal. Beyond
    `MAX_CELLS` positions a cell stands for several of them and is the more opaque the more of its edges exist.

    Args:
        batch, head: which element of B and G.
        ax: axes to draw on; left out, those of a new figure that pyplot does not know of (``ax.figure.savefig(...)``).

    Returns: the axes.

    Raises:
        GraphError: ``batch`` or ``head`` out of range.
    """
    for name, index, size in (("batch", batch, graph.batch), ("head", head, graph.graph_heads)):
        if not 0 <= index < size:
            raise GraphError(f"{name} must lie in [0, {size}), got {index}")
    if ax is None:
        ax = Figure(figsize=(6.4, 6.0), layout="constrained").add_subplot()
    queries, keys = graph.num_queries, graph.num_keys
    cell = (max(1, -(-queries // MAX_CELLS)), max(1, -(-keys // MAX_CELLS)))
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    title = f"neighbors, batch {batch}, graph head {head}"
    if cell != (1, 1):
        title += f": density, {cell[0]} × {cell[1]} positions to a cell"
    ax.set_title(title, fontsize="medium")
    if queries == 0 or keys == 0:
        return ax
    counts = _edge_counts(graph, batch, head, cell)
    # the last cell may reach beyond the sequence; the limits below cut it off
    height, width = next(iter(counts.values())).shape
    extent = (-0.5, width * cell[1] - 0.5, height * cell[0] - 0.5, -0.5)
    image = _paint(counts, cell, _future_cells(graph, batch, cell, height, width))
    aspect: Literal["equal", "auto"] = "equal" if max(queries, keys) <= 3 * min(queries, keys) else "auto"
    ax.imshow(image.numpy(), extent=extent, origin="upper", interpolation="nearest", aspect=aspect)
    ax.set_xlim(-0.5, keys - 0.5)
    ax.set_ylim(queries - 0.5, -0.5)
    _legend(ax, {part: float(c.sum()) / queries for part, c in counts.items()}, graph.causal)
    return ax


def _edge_counts(graph: NeighborGraph, batch: int, head: int, cell: tuple[int, int]) -> dict[str, Tensor]:
    """How many edges of each part fall into each cell: int64 ``[ceil(N / rows), ceil(M / columns)]``, on the CPU."""
    height, width = -(-graph.num_queries // cell[0]), -(-graph.num_keys // cell[1])
    counts = {part: torch.zeros(height * width, dtype=torch.int64) for part in PART_COLORS}
    for rows, piece in graph.row_chunks():
        first_cell = torch.arange(rows.start, rows.stop)[:, None] // cell[0] * width
        for part, keys in piece.part_keys().items():
            keys = keys[batch if keys.shape[0] > 1 else 0, head if keys.shape[1] > 1 else 0].cpu()  # [T, E]
            found = (first_cell + keys // cell[1])[keys >= 0]
            counts[part] += torch.bincount(found, minlength=height * width)
    return {part: c.view(height, width) for part, c in counts.items()}


def _future_cells(graph: NeighborGraph, batch: int, cell: tuple[int, int], height: int, width: int) -> Tensor:
    """bool ``[height, width]``: cells with keys after every query of the cell, where the graph is causal."""
    if not graph.causal:
        return torch.zeros((height, width), dtype=torch.bool)
    positions = graph.mask.positions[batch if graph.mask.positions.shape[0] > 1 else 0].cpu()
    latest = torch.stack([piece.max() for piece in positions.split(cell[0])])
    return torch.arange(width)[None] * cell[1] > latest[:, None]


def _paint(counts: dict[str, Tensor], cell: tuple[int, int], future: Tensor) -> Tensor:
    """RGBA float32 ``[height, width, 4]``; a cell with several parts gets the mean of their colours."""
    weights = torch.stack(list(counts.values()), dim=-1).float()  # [height, width, parts]
    total = weights.sum(-1, keepdim=True)
    colors = torch.tensor([to_rgb(PART_COLORS[part]) for part in counts])
    image = torch.zeros((*future.shape, 4))
    image[future] = torch.tensor(_FUTURE)
    opacity = _FAINTEST + (1.0 - _FAINTEST) * (total / (cell[0] * cell[1])).clamp(max=1.0).sqrt()
    painted = torch.cat([weights @ colors / total.clamp(min=1.0), opacity], dim=-1)
    return torch.where(total > 0, painted, image)


def _legend(ax: Axes, per_query: dict[str, float], causal: bool) -> None:
    handles = [
        Patch(color=PART_COLORS[part], label=f"{part}: {mean:.1f} per query")
        for part, mean in per_query.items()
        if mean > 0
    ]
    if causal:
        handles.append(Patch(facecolor=_FUTURE, edgecolor="0.6", label="after the query"))
        ax.legend(handles=handles, loc="upper right", fontsize="small")  # where a causal graph is empty
    elif handles:
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(handles), fontsize="small")
