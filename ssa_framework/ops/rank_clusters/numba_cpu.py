"""CPU kernels: strips of centroids for each KV head, then a task ranks for one head and a block of queries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.numba_runtime import Workspace, as_array, parallel_for
from ssa_framework.ops.rank_clusters.numba_rank import LANES, ROWS, STRIP, TOGETHER, Scratch, build_strips, rank_block

_BLOCK = 512


def rank(q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int) -> Tensor:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, dim = q.shape
    kv_heads, slots = clusters.size.shape[1:]
    opened = torch.empty((batch, heads, queries, most), dtype=torch.int32)
    q_array, out = as_array(q.float()), opened.numpy()
    low, high = (as_array(x.expand(batch, -1, -1)) for x in limits)
    sizes, centroids = as_array(clusters.size), as_array(clusters.centroids.float())
    count = max(1, -(-slots // STRIP))
    strips = np.empty((batch, kv_heads, count * dim * STRIP), dtype=np.float32)
    numbers = np.empty((batch, kv_heads, slots), dtype=np.int32)
    before = np.empty((batch, kv_heads, slots + 1), dtype=np.int32)

    def build(pair: int) -> None:
        b, h = divmod(pair, kv_heads)
        build_strips(centroids[b, h], sizes[b, h], strips[b, h], numbers[b, h], before[b, h])

    parallel_for(build, batch * kv_heads)
    blocks = -(-queries // _BLOCK)
    space = Workspace()

    def body(task: int) -> None:
        pair, block = divmod(task, blocks)
        b, g = divmod(pair, heads)
        h = g // (heads // kv_heads)
        rank_block(
            q_array[b, g], strips[b, h], numbers[b, h], before[b, h], sizes[b, h], low[b], high[b], block * _BLOCK,
            min(queries, (block + 1) * _BLOCK), budget, _scratch(space, count), out[b, g],
        )  # fmt: skip

    parallel_for(body, batch * heads * blocks)
    return opened


def _scratch(space: Workspace, strips: int) -> Scratch:
    wide = -(-strips // LANES) * LANES
    return Scratch(
        space.array("sums", TOGETHER * STRIP, np.float32),
        space.array("ranks", ROWS * strips * STRIP, np.int32).reshape(ROWS, -1),
        space.array("largest", ROWS * wide, np.int32).reshape(ROWS, -1),
        space.array("places", ROWS * wide, np.int32).reshape(ROWS, -1),
        space.array("left", ROWS, np.int64),
        space.array("found", ROWS, np.int64),
    )
