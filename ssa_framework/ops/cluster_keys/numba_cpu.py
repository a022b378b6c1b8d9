"""CPU kernels: a task clusters one segment of one head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.numba_lloyd import LANES, TILE, TOGETHER, Scratch, cluster_segment
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots
from ssa_framework.ops.numba_runtime import Workspace, as_array, parallel_for


def cluster(k: Tensor, starts: Tensor, length: int, initial: Tensor, iterations: int, capacity: int) -> Clusters:
    """See `ssa_framework.ops.cluster_keys.api.cluster_keys`; ``initial`` int32 ``[clusters]``, places in a segment."""
    batch, heads, _, dim = k.shape
    segments, clusters = starts.shape[1], initial.shape[0]
    slots = cluster_slots(length, clusters, capacity)
    order = torch.zeros((batch, heads, segments * length), dtype=torch.int32)
    start = torch.zeros((batch, heads, segments * slots), dtype=torch.int32)
    size = torch.zeros_like(start)
    centroids = torch.zeros((batch, heads, segments * slots, dim), dtype=torch.float32)
    keys, places = as_array(k.float()), as_array(initial)
    firsts = as_array(starts.expand(batch, -1))
    outputs = order.numpy(), start.numpy(), size.numpy(), centroids.numpy()
    space = Workspace()

    def body(task: int) -> None:
        pair, f = divmod(task, segments)
        b, h = divmod(pair, heads)
        first = int(firsts[b, f])
        if first >= 0:
            orders, starts_, sizes, means = (x[b, h] for x in outputs)
            scratch = _scratch(space, length, clusters, dim)
            cluster_segment(
                keys[b, h], first, length, places, iterations, capacity, scratch, f * length, f * slots, orders,
                starts_, sizes, means,
            )  # fmt: skip

    parallel_for(body, batch * heads * segments)
    return Clusters(order, start, size, centroids)


def _scratch(space: Workspace, length: int, clusters: int, dim: int) -> Scratch:
    rows = -(-length // TILE) * TILE
    columns = -(-clusters // TOGETHER) * TOGETHER
    width = -(-dim // LANES) * LANES
    return Scratch(
        space.array("rows", rows * width, np.float32),
        space.array("tiles", rows * width, np.float32),
        space.array("centroids", columns * width, np.float32),
        space.array("norms", columns, np.float32),
        space.array("sums", clusters * width, np.float32),
        space.array("counts", clusters, np.int32),
        space.array("scores", columns * TILE, np.float32),
        space.array("best", TILE, np.float32),
        space.array("owner", rows, np.int32),
        width,
    )
