"""Few queries: the clusters scored by many programs, then opened by one for each query."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.triton_few import (
    Kept,
    best_few_kernel,
    open_few_kernel,
    score_few_kernel,
)
from ssa_framework.ops.rank_clusters.triton_rank import Limits, Opened
from ssa_framework.ops.rank_clusters.triton_tile import padded, parts_of_queries, tile_for
from ssa_framework.ops.rank_clusters.types import OpenedClusters
from ssa_framework.ops.triton_runtime import launches

FEW = 4
"""Most queries for which clusters are shared out among programs."""

_PROGRAMS = 512
"""Of all heads together, as many as a large GPU holds at a time (4 on a multiprocessor, with 128 registers): they begin
with loads that wait for one another."""

_CLUSTERS = 16

_SHARE = 256
"""Entries of which a program chooses the best."""

_CHUNK = 1024
"""Entries that are compared at once in the end: the best of 16 shares, if few are opened."""


@launches
def rank(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`; ``limits`` must be ranges that share no cluster."""
    batch, heads, queries, dim = q.shape
    kv_heads, slots = clusters.size.shape[1:3]
    numbers, start, end = (
        torch.empty((batch, heads, queries, most), dtype=torch.int32, device=q.device) for _ in range(3)
    )
    if not numbers.numel():
        return OpenedClusters(numbers, start, end)
    low, high = limits
    if low.stride() != high.stride():
        low, high = low.contiguous(), high.contiguous()
    of_limits = Limits(low, high, low.stride(0) if low.shape[0] > 1 else 0, low.stride(1), low.stride(2), low.shape[2])
    kept = Kept(
        clusters.centroids.float().contiguous(),
        clusters.variances.float().contiguous() if spread and clusters.variances is not None else None,
        clusters.start.contiguous(),
        clusters.size.contiguous(),
        slots,
    )
    tiles = triton.cdiv(slots, _CLUSTERS) + low.shape[2]
    room = tiles * _CLUSTERS
    entries = torch.empty((batch, heads, queries, room), dtype=torch.int64, device=q.device)
    tile, highest = tile_for(padded(dim)), triton.next_power_of_2(most)
    at_least = {"QUERIES": triton.next_power_of_2(queries), "RANGES": triton.next_power_of_2(low.shape[2])}
    programs = min(tiles, max(1, _PROGRAMS // (batch * heads)))
    score_few_kernel[(programs, heads, batch)](
        q, *q.stride(), kept, of_limits, entries, room, kv_heads, queries, float(spread),
        D=dim, W=padded(dim), ROWS=tile.rows, CLUSTERS=_CLUSTERS, PARTS=parts_of_queries(q), **at_least,
        num_warps=tile.warps, num_stages=1, maxnreg=128 if padded(dim) <= 128 else None,
    )  # fmt: skip
    share = max(_SHARE, highest)
    shares = triton.cdiv(room, share)
    width = shares * highest
    best = torch.empty((batch, heads, queries, width), dtype=torch.int64, device=q.device)
    cut = {**at_least, "CLUSTERS": _CLUSTERS, "SHARE": share, "MOST": highest, "num_warps": 4}
    best_few_kernel[(shares * queries, heads, batch)](of_limits, entries, best, room, width, slots, queries, **cut)
    open_few_kernel[(queries, heads, batch)](
        kept, of_limits, best, Opened(numbers, start, end, most, min(budget, 2**31 - 1)), room, width, kv_heads,
        queries, CHUNK=max(2 * highest, min(_CHUNK, 16 * highest)), **cut,
    )  # fmt: skip
    return OpenedClusters(numbers, start, end)
