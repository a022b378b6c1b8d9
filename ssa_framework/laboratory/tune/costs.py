"""What a graph costs and how far its output is off, as far as a search needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph
from ssa_framework.laboratory.capture import LayerTensors
from ssa_framework.quality.rows import DenseRows, SummaryMeans, row_chunks


@dataclass(frozen=True)
class Figures:
    """Of a graph of some queries of a layer, as `measure` defines them: keys that a query looks at, and summaries;
    ``output_error``; the square of ``output_error_total``; and allowed keys."""

    cost: float
    error: float
    squared: float
    allowed: float


@torch.no_grad()
def figures_of(layer: LayerTensors, rows: Tensor, graphs: Mapping[str, NeighborGraph]) -> dict[str, Figures]:
    """What `measure` says of the graphs of the queries ``rows``, as far as a search needs it, which is a fraction of
    the work."""
    query, chunks = layer.q[:, :, rows], list(row_chunks(layer.q[:, :, rows], layer.k))
    means = {name: SummaryMeans.of(layer.k, layer.v, graph) for name, graph in graphs.items()}
    kept: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in graphs}
    of_dense = []
    for chunk in chunks:
        some = query[:, :, chunk]
        pieces = {name: graph.pick(chunk) for name, graph in graphs.items()}
        dense = DenseRows.of(some, layer.k, layer.v, next(iter(pieces.values())).mask, layer.scale)
        size = dense.out.norm(dim=-1)
        of_dense.append((size, dense.allowed))
        for name, piece in pieces.items():
            mean = means[name]
            out, degree, summaries = dense.output_over(piece, None if mean is None else mean.rows(some, layer.scale))
            apart = (out - dense.out).norm(dim=-1)
            kept[name].append((apart, torch.where(apart == 0, 0.0, apart / size), degree, summaries))
    size, allowed = (torch.cat(parts, dim=-1).double() for parts in zip(*of_dense, strict=True))
    found = {}
    for name, parts in kept.items():
        apart, error, degree, summaries = (torch.cat(x, dim=-1).double() for x in zip(*parts, strict=True))
        looked_at, scored = float(degree.mean()), graphs[name].keys_scored()
        if any(scored.values()):
            slots = graphs[name].slots_by_source()
            looked_at = max(looked_at, sum(max(scored[source], slots[source]) for source in scored))
        squared = float(apart.square().sum() / size.square().sum().clamp(min=1e-30))
        found[name] = Figures(looked_at + float(summaries.mean()), float(error.mean()), squared, float(allowed.mean()))
    return found
