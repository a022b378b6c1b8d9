"""A graph of some of the queries, so that quality can be looked at for any length."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask


def sample_rows(queries: int, sample: int, seed: int, device: torch.device) -> Tensor:
    """One row drawn from each of ``sample`` equal stretches: ascending, int64 ``[min(N, sample)]``."""
    if sample >= queries:
        return torch.arange(queries, device=device)
    edges = torch.arange(sample + 1, dtype=torch.int64) * queries // sample
    draws = torch.rand(sample, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    starts, lengths = edges[:-1], edges.diff()
    return (starts + (draws * lengths).long().clamp(max=lengths - 1)).to(device)


def pick_queries(graph: NeighborGraph, rows: Tensor) -> NeighborGraph:
    """The graph of some queries only. What the sources brought is a sum over all queries, so it is left out."""
    mask = graph.mask
    attn_mask, mask_mod = mask.attn_mask, mask.mask_mod
    if attn_mask is not None and attn_mask.shape[2] > 1:
        attn_mask = attn_mask[:, :, rows]
    row_offset = mask.row_offset
    picked = EdgeMask(
        causal=mask.causal,
        positions=mask.positions[:, rows],
        offset=None,
        key_keep=mask.key_keep,
        query_segments=None if mask.query_segments is None else mask.query_segments[:, rows],
        key_segments=mask.key_segments,
        attn_mask=attn_mask,
        mask_mod=None if mask_mod is None else lambda b, h, i, m: mask_mod(b, h, rows[i] + row_offset, m),
        batch_offset=mask.batch_offset,
    )
    return replace(graph.with_queries(picked, rows), sources={})
