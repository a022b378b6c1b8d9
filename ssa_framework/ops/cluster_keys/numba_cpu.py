"""CPU kernels: a task clusters some segments of one head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.numba_lloyd import LANES, Scratch, cluster_segments
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots
from ssa_framework.ops.numba_runtime import Workspace, as_array, parallel_for
from ssa_framework.ops.numba_tile_products import TILE, TILE_ROWS

_KEYS_OF_A_TASK = 2048


def cluster(
    k: Tensor, starts: Tensor, length: int, initial: Tensor, steps: list[int], stride: int, capacity: int
) -> Clusters:
    """See `ssa_framework.ops.cluster_keys.api.cluster_keys`; ``initial`` int32 ``[clusters]``, places in a segment;
    ``steps``: how many keys each Lloyd step looks at, all of them or every ``stride``-th."""
    batch, heads, _, dim = k.shape
    segments, clusters = starts.shape[1], initial.shape[0]
    slots = cluster_slots(length, clusters, capacity)
    order = torch.zeros((batch, heads, segments * length), dtype=torch.int32)
    start = torch.zeros((batch, heads, segments * slots), dtype=torch.int32)
    size = torch.zeros_like(start)
    centroids = torch.zeros((batch, heads, segments * slots, dim), dtype=torch.float32)
    variances = torch.zeros_like(centroids)
    keys, places, counts = as_array(k.float()), as_array(initial), np.array(steps, np.int32)
    firsts = as_array(starts.expand(batch, -1))
    outputs = order.numpy(), start.numpy(), size.numpy(), centroids.numpy(), variances.numpy()
    space = Workspace()

    together = max(1, _KEYS_OF_A_TASK // length)
    tasks = -(-segments // together)

    def body(task: int) -> None:
        pair, part = divmod(task, tasks)
        b, h = divmod(pair, heads)
        scratch = _scratch(space, length, clusters, dim, stride)
        cluster_segments(
            keys[b, h], firsts[b], part * together, min(segments, (part + 1) * together), length, places, counts,
            capacity, slots, scratch, *(x[b, h] for x in outputs),
        )  # fmt: skip

    parallel_for(body, batch * heads * tasks)
    return Clusters(order, start, size, centroids, variances)


def _scratch(space: Workspace, length: int, clusters: int, dim: int, stride: int) -> Scratch:
    rows = -(-length // TILE) * TILE
    columns = -(-clusters // TILE_ROWS) * TILE_ROWS
    width = -(-dim // LANES) * LANES
    return Scratch(
        space.array("rows", rows * width, np.float32),
        space.array("tiles", rows * width, np.float32),
        space.array("centroids", columns * width, np.float32),
        space.array("norms", columns, np.float32),
        space.array("mean", width, np.float32),
        space.array("sums", max(2, clusters) * width, np.float32),
        space.array("counts", clusters, np.int32),
        space.array("owner", rows, np.int32),
        width,
        stride,
    )
