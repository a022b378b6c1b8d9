"""CUDA: the tables in bfloat16, then products, the best of each query and what fits its budget in one launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.triton_rank import Limits, Opened, Scratch, Table, rank_kernel, split_kernel
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_MOST = 256
"""Clusters of a query that are sorted."""

_MAX_WIDTH = 256


class Tile(NamedTuple):
    """Queries and clusters of a tile, and how a program runs: ``stages`` tiles on their way, ``programs`` of them on a
    multiprocessor."""

    rows: int
    clusters: int
    warps: int
    stages: int
    programs: int


NARROW, WIDE = Tile(64, 32, 4, 3, 2), Tile(64, 32, 4, 2, 1)
"""Up to 128 coordinates, and more: as shared memory allows."""

CHUNK = 512
"""Clusters that are scored before those that may be opened are chosen; a program's scores take ``4 * rows * CHUNK``
bytes, those of all programs should fit the L2 cache."""


def tile_for(width: int) -> Tile:
    return NARROW if width <= 128 else WIDE


def _shared_memory(width: int, parts: int) -> int:
    """Bytes: queries in ``parts`` and their squares, tables of the tiles on their way, scores that change threads."""
    tile = tile_for(width)
    return 2 * width * ((parts + 1) * tile.rows + 3 * tile.stages * tile.clusters) + 4 * tile.rows * tile.clusters


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _parts(q: Tensor) -> int:
    return 1 if q.dtype == torch.bfloat16 else 2


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
        return _why_not_device(q.device, _shared_memory(_padded(q.shape[3]), _parts(q)))
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


def rank(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, dim = q.shape
    kv_heads = clusters.size.shape[1]
    shape = (batch, heads, queries, most)
    numbers, start, end = (torch.empty(shape, dtype=torch.int32, device=q.device) for _ in range(3))
    if not numbers.numel():
        return OpenedClusters(numbers, start, end)
    width = _padded(dim)
    tile = tile_for(width)
    low, high = limits
    if low.stride() != high.stride():
        low, high = low.contiguous(), high.contiguous()
    blocks = triton.cdiv(queries, tile.rows)
    items = blocks * heads * batch
    programs = min(items, tile.programs * _multiprocessors(q.device))
    kept = max(16, triton.next_power_of_2(most))
    lists = 32 * tile.warps // tile.rows
    capacity = triton.next_power_of_2(CHUNK // lists + kept)
    scratch = Scratch(
        torch.empty((programs, tile.rows, CHUNK), dtype=torch.int32, device=q.device),
        torch.empty((programs, tile.rows, lists, capacity), dtype=torch.int64, device=q.device),
        torch.empty((programs, lists, tile.rows), dtype=torch.int32, device=q.device),
        torch.empty((programs, tile.rows), dtype=torch.int32, device=q.device),
    )
    rank_kernel[(programs,)](
        q, *q.stride(), _table(clusters, width, tile.clusters, bool(spread)),
        Limits(low, high, low.stride(0) if low.shape[0] > 1 else 0, low.stride(1), low.stride(2), low.shape[2]),
        Opened(numbers, start, end, most, min(budget, 2**31 - 1)), scratch,
        blocks, heads, kv_heads, items, queries, float(spread),
        D=dim, W=width, ROWS=tile.rows, CLUSTERS=tile.clusters, CHUNK=CHUNK, LISTS=lists, CAPACITY=capacity, KEPT=kept,
        SORTED=min(tile.rows, 16 * 32 * tile.warps // kept), PARTS=_parts(q),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return OpenedClusters(numbers, start, end)


def _table(clusters: Clusters, width: int, more: int, spread: bool) -> Table:
    """What the kernel multiplies; ``more`` rows of zeros behind the last one, since it reads whole tiles."""
    centroids = clusters.centroids
    batch, kv_heads, slots, dim = centroids.shape
    rows = batch * kv_heads * slots
    tables = [
        torch.empty((rows + more, width), dtype=torch.bfloat16, device=centroids.device)
        for _ in range(3 if spread else 2)
    ]
    high, low, rounded = tables if spread else (*tables, None)
    size = torch.empty(rows + more, dtype=torch.int32, device=centroids.device)
    variances = clusters.variances.float().contiguous() if spread and clusters.variances is not None else None
    split_kernel[(triton.cdiv(rows + more, 16),)](
        centroids.float().contiguous(), variances, clusters.size.contiguous(), high, low, rounded, size,
        rows, rows + more, D=dim, W=width, ROWS=16, num_warps=4,
    )  # fmt: skip
    return Table(high, low, rounded, clusters.start.contiguous(), size, slots)
