"""CUDA: the tables in bfloat16, then products, the best of each query and what fits its budget in one launch."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.triton_rank import Limits, Opened, Scratch, Table, rank_kernel, split_kernel
from ssa_framework.ops.rank_clusters.triton_tile import padded, parts_of_queries, tile_for
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_MOST = 256
"""Clusters of a query that are sorted."""

_MAX_WIDTH = 256


def _shared_memory(width: int, parts: int) -> int:
    """Bytes, about: queries in ``parts`` and their squares, three tables of a tile of clusters, and what moves."""
    tile = tile_for(width)
    return 2 * width * ((parts + 1) * tile.rows + 3 * tile.clusters) + 2 * tile.clusters**2 + 8 * 1024


def why_not(q: Tensor, most: int) -> str | None:
    """Why the kernel cannot rank for ``q [B, G, N, D]``, if it cannot."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it scores float16, bfloat16 and float32, got {q.dtype}"
    if most > _MOST:
        return f"it opens up to {_MOST} clusters a query, got {most}"
    if q.shape[3] > _MAX_WIDTH:
        return f"it multiplies up to {_MAX_WIDTH} coordinates, got {q.shape[3]}"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and triton_runtime.INTERPRETED.value):
        return f"it needs CUDA tensors (or, to try it on a CPU, TRITON_INTERPRET=1), got {q.device}"
    if q.device.type == "cuda":
        return _why_not_device(q.device, _shared_memory(padded(q.shape[3]), parts_of_queries(q)))
    return None


@functools.lru_cache
def _why_not_device(device: torch.device, wanted: int) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and (properties.major, properties.minor) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    memory = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    return f"it needs {wanted} bytes of shared memory, the GPU has {memory}" if memory < wanted else None


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@triton_runtime.launches
def rank(
    q: Tensor,
    clusters: Clusters,
    limits: tuple[Tensor, Tensor],
    budget: int,
    most: int,
    spread: float,
    disjoint: bool = False,
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, dim = q.shape
    kv_heads = clusters.size.shape[1]
    shape = (batch, heads, queries, most)
    numbers, start, end = (torch.empty(shape, dtype=torch.int32, device=q.device) for _ in range(3))
    if not numbers.numel():
        return OpenedClusters(numbers, start, end)
    width = padded(dim)
    tile = tile_for(width)
    low, high = limits
    if low.stride() != high.stride():
        low, high = low.contiguous(), high.contiguous()
    blocks = triton.cdiv(queries, tile.rows)
    items = blocks * heads * batch
    programs = min(items, tile.programs * _multiprocessors(q.device))
    kept = max(32, triton.next_power_of_2(most * 5 // 4))
    capacity = max(4 * tile.clusters, 2 * kept)
    scratch = Scratch(
        torch.empty((programs, tile.rows, capacity), dtype=torch.int64, device=q.device),
        *(torch.empty((programs, tile.rows), dtype=torch.int32, device=q.device) for _ in range(2)),
    )
    rank_kernel[(programs,)](
        q, *q.stride(), _table(clusters, width, tile.clusters, bool(spread)),
        Limits(low, high, low.stride(0) if low.shape[0] > 1 else 0, low.stride(1), low.stride(2), low.shape[2]),
        Opened(numbers, start, end, most, min(budget, 2**31 - 1)), scratch,
        blocks, heads, kv_heads, items, queries, float(spread),
        D=dim, W=width, ROWS=tile.rows, CLUSTERS=tile.clusters, CAPACITY=capacity, KEPT=kept,
        SORTED=min(tile.rows, 32 * 32 * tile.warps // kept), PARTS=parts_of_queries(q),
        DISJOINT=disjoint or low.shape[2] == 1,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return OpenedClusters(numbers, start, end)


def _table(clusters: Clusters, width: int, more: int, spread: bool) -> Table:
    """What the kernel multiplies; ``more`` rows of zeros behind the last one, since it reads whole tiles."""
    batch, kv_heads, slots, dim = clusters.centroids.shape
    rows = batch * kv_heads * slots
    tables = [
        torch.empty((rows + more, width), dtype=torch.bfloat16, device=clusters.centroids.device)
        for _ in range(3 if spread else 2)
    ]
    high, low, rounded = tables if spread else (*tables, None)
    variances = clusters.variances.float().contiguous() if spread and clusters.variances is not None else None
    split_kernel[(triton.cdiv(rows + more, 16),)](
        clusters.centroids.float().contiguous(), variances, high, low, rounded, rows, rows + more,
        D=dim, W=width, ROWS=16, num_warps=4,
    )  # fmt: skip
    return Table(high, low, rounded, clusters.start.contiguous(), clusters.size.contiguous(), slots)
