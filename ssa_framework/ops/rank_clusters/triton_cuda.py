"""CUDA: products, the best of each query and what fits its budget, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.triton_rank import Limits, Table, rank_kernel
from ssa_framework.ops.rank_clusters.types import OpenedClusters

# of a tile: queries, clusters, and coordinates that are multiplied at once (as registers allow; not measured)
_ROWS = 64
_CLUSTERS = 32
_DIMS = 32

_MOST = 64  # clusters of a query that stay in registers
_MAX_GRID = 65535


def why_not(q: Tensor, most: int) -> str | None:
    """Why the kernel cannot rank for ``q [B, G, N, D]``, if it cannot."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it scores float16, bfloat16 and float32, got {q.dtype}"
    if most > _MOST:
        return f"it opens up to {_MOST} clusters a query, got {most}"
    if max(q.shape[:2]) > _MAX_GRID:
        return f"it serves up to {_MAX_GRID} batch elements and heads, got {list(q.shape)}"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and triton_runtime.INTERPRETED.value):
        return f"it needs CUDA tensors (or, to try it on a CPU, TRITON_INTERPRET=1), got {q.device}"
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return None


def rank(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, dim = q.shape
    kv_heads, slots = clusters.size.shape[1:]
    shape = (batch, heads, queries, most)
    numbers, start, end = (torch.empty(shape, dtype=torch.int32, device=q.device) for _ in range(3))
    if not numbers.numel():
        return OpenedClusters(numbers, start, end)
    variances = clusters.variances if spread else None
    table = Table(
        clusters.centroids.float().contiguous(),
        None if variances is None else variances.float().contiguous(),
        clusters.start.contiguous(),
        clusters.size.contiguous(),
        slots,
    )
    low, high = limits
    if low.stride() != high.stride():
        low, high = low.contiguous(), high.contiguous()
    rank_kernel[(triton.cdiv(queries, _ROWS), heads, batch)](
        q, *q.stride(), table,
        Limits(low, high, low.stride(0) if low.shape[0] > 1 else 0, low.stride(1), low.stride(2), low.shape[2]),
        numbers, start, end, queries, kv_heads, min(budget, 2**31 - 1), most, float(spread),
        D=dim, DIMS=_DIMS, ROWS=_ROWS, CLUSTERS=_CLUSTERS, KEPT=triton.next_power_of_2(most),
        PRECISION="tf32x3" if torch.version.hip is None else "ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    return OpenedClusters(numbers, start, end)
