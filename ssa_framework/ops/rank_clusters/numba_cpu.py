"""CPU kernels: rows of the clusters of each KV head, then a task ranks for one head and a block of queries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.numba_runtime import Workspace, as_array, parallel_for
from ssa_framework.ops.numba_tile_products import TILE
from ssa_framework.ops.rank_clusters.numba_rank import GROUP, LANES, Scratch, build_rows, rank_block
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_BLOCK = 1024


def rank(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, dim = q.shape
    kv_heads, slots = clusters.size.shape[1:]
    opened = OpenedClusters(*(torch.empty((batch, heads, queries, most), dtype=torch.int32) for _ in range(3)))
    numbers_out, start_out, end_out = (x.numpy() for x in (opened.numbers, opened.start, opened.end))
    queries_in = as_array(q.float())
    low, high = (as_array(x.expand(batch, -1, -1)) for x in limits)
    starts, sizes = as_array(clusters.start), as_array(clusters.size)
    parts = (
        [clusters.centroids] if clusters.variances is None or not spread else [clusters.centroids, clusters.variances]
    )
    tables = [as_array(x.float()) for x in parts]
    width = -(-dim // LANES) * LANES
    groups = -(-slots // GROUP)
    rows = np.empty((batch, kv_heads, groups * GROUP * len(tables) * width), dtype=np.float32)
    numbers = np.empty((batch, kv_heads, slots), dtype=np.int32)
    before = np.empty((batch, kv_heads, slots + 1), dtype=np.int32)

    def build(pair: int) -> None:
        b, h = divmod(pair, kv_heads)
        build_rows(
            tables[0][b, h], tables[-1][b, h], len(tables), sizes[b, h], width, rows[b, h], numbers[b, h], before[b, h]
        )

    parallel_for(build, batch * kv_heads)
    blocks = -(-queries // _BLOCK)
    space = Workspace()

    def body(task: int) -> None:
        pair, block = divmod(task, blocks)
        b, g = divmod(pair, heads)
        h = g // (heads // kv_heads)
        scratch = _scratch(space, groups, width, len(tables), limits[0].shape[2])
        rank_block(
            queries_in[b, g], rows[b, h], numbers[b, h], before[b, h], starts[b, h], sizes[b, h], low[b], high[b],
            block * _BLOCK, min(queries, (block + 1) * _BLOCK), budget, np.float32(spread), scratch,
            numbers_out[b, g], start_out[b, g], end_out[b, g],
        )  # fmt: skip

    parallel_for(body, batch * heads * blocks)
    return opened


def _scratch(space: Workspace, groups: int, width: int, parts: int, ranges: int) -> Scratch:
    return Scratch(
        space.array("queries", TILE * width, np.float32),
        space.array("row", TILE, np.int32),
        space.array("tile", parts * width * TILE, np.float32),
        space.array("low", ranges * TILE, np.int32).reshape(ranges, TILE),
        space.array("high", ranges * TILE, np.int32).reshape(ranges, TILE),
        space.array("reach", ranges * 4, np.int32).reshape(ranges, 4),
        space.array("inside", TILE, np.int32),
        space.array("scores", groups * GROUP * TILE, np.float32),
        space.array("largest", groups * TILE, np.float32),
        space.array("group", groups, np.int32),
        space.array("best", TILE, np.float32),
        space.array("where", TILE, np.int32),
        space.array("left", TILE, np.int64),
        space.array("found", TILE, np.int64),
        width,
    )
