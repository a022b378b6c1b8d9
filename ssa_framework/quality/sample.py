"""A graph of some of the queries, so that quality can be looked at for any length."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph


def sample_rows(queries: int, sample: int, seed: int, device: torch.device) -> Tensor:
    """One row drawn from each of ``sample`` equal stretches: ascending, int64 ``[min(N, sample)]``."""
    if sample >= queries:
        return torch.arange(queries, device=device)
    edges = torch.arange(sample + 1, dtype=torch.int64) * queries // sample
    draws = torch.rand(sample, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    starts, lengths = edges[:-1], edges.diff()
    return (starts + (draws * lengths).long().clamp(max=lengths - 1)).to(device)


def pick_queries(graph: NeighborGraph, rows: Tensor) -> NeighborGraph:
    """The graph of some queries only; see `NeighborGraph.pick`."""
    return graph.pick(rows)
