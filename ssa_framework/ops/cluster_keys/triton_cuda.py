"""CUDA: k-means of all segments in one launch, a sort by cluster, means in another launch; the host never waits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.triton_lloyd import average_kernel, lloyd_kernel
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots

_MAX_CENTROIDS = 8 * 1024  # numbers that a program holds twice
_SHARED_MEMORY = 132 * 1024  # bytes that it may take then, and float32 keys beside it
_MAX_GRID = 65535


def why_not(k: Tensor, clusters: int) -> str | None:
    """Why the kernels cannot cluster ``k [B, Hkv, M, D]``, if they cannot."""
    if k.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it reads float16, bfloat16 and float32, got {k.dtype}"
    room = _padded(clusters) * _padded(k.shape[3])
    if room > _MAX_CENTROIDS:
        return f"it holds up to {_MAX_CENTROIDS} coordinates of the centroids of a segment, got {room}"
    if max(k.shape[:2]) > _MAX_GRID:
        return f"it serves up to {_MAX_GRID} batch elements and heads, got {list(k.shape)}"
    if k.device.type != "cuda" and not (k.device.type == "cpu" and triton_runtime.INTERPRETED.value):
        return f"it needs CUDA tensors (or, to try it on a CPU, TRITON_INTERPRET=1), got {k.device}"
    if k.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(k.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if k.device.type == "cuda":
        memory = triton.runtime.driver.active.utils.get_device_properties(k.device.index)["max_shared_mem"]
        if memory < _SHARED_MEMORY:
            return f"it needs {_SHARED_MEMORY} bytes of shared memory, the GPU has {memory}"
    return None


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def cluster(
    k: Tensor, starts: Tensor, length: int, initial: Tensor, steps: list[int], stride: int, capacity: int
) -> Clusters:
    """See `ssa_framework.ops.cluster_keys.api.cluster_keys`; ``initial`` int32 ``[clusters]``, places in a segment;
    ``steps``: how many keys each Lloyd step looks at, all of them or every ``stride``-th."""
    batch, heads, keys, dim = k.shape
    segments, clusters = starts.shape[1], initial.shape[0]
    slots = cluster_slots(length, clusters, capacity)
    device = k.device
    starts = starts.to(device)
    tables = [torch.zeros((batch, heads, segments * slots, dim), dtype=torch.float32, device=device) for _ in range(2)]
    order = torch.zeros((batch, heads, segments, length), dtype=torch.int32, device=device)
    size = torch.zeros((batch, heads, segments, slots), dtype=torch.int32, device=device)
    if keys < length or not k.numel() or not segments:
        return Clusters(order.flatten(2), size.flatten(2), size.flatten(2).clone(), *tables)
    owners = torch.empty_like(order)
    counts = torch.empty((batch, heads, segments, clusters), dtype=torch.int32, device=device)
    coarse = [count for count in steps if count != length]
    lloyd_kernel[(segments, heads, batch)](
        k, *k.stride(), starts, starts.stride(0) if starts.shape[0] > 1 else 0, segments,
        initial.to(device, non_blocking=True), owners, counts, length, clusters,
        len(coarse), coarse[0] if coarse else 0, stride, len(steps),
        D=dim, W=_padded(dim), KEYS=32, CLUSTERS=_padded(clusters),
        PRECISION="tf32x3" if torch.version.hip is None else "ieee", num_warps=8, num_stages=1,
    )  # fmt: skip
    used = (starts >= 0)[:, None, :, None]
    order = torch.where(used, owners.sort(dim=-1, stable=True).indices + starts[:, None, :, None], 0).to(torch.int32)
    size = torch.where(used, _sizes(counts, capacity, slots), 0)
    first_key = torch.arange(segments, device=device)[:, None] * length
    start = torch.where(size > 0, first_key + size.cumsum(-1) - size, 0).to(torch.int32)
    order, start, size = order.flatten(2), start.flatten(2), size.flatten(2).to(torch.int32)
    average_kernel[(segments * slots, heads, batch)](
        k, *k.stride(), order, start, size, *tables, order.shape[2],
        D=dim, W=_padded(dim), KEYS=16, num_warps=1,
    )  # fmt: skip
    return Clusters(order, start, size, *tables)


def _sizes(counts: Tensor, capacity: int, slots: int) -> Tensor:
    """``counts [.., clusters]`` cut into pieces of up to ``capacity`` keys, equally large: int64 ``[.., slots]``."""
    counts = counts.long()
    pieces = (counts + capacity - 1) // capacity
    after = pieces.cumsum(-1)
    slot = torch.arange(slots, device=counts.device).expand(*counts.shape[:-1], slots).contiguous()
    owner = torch.searchsorted(after, slot, right=True)
    inside = owner < counts.shape[-1]
    owner = owner.clamp(max=counts.shape[-1] - 1)
    count, parts = counts.gather(-1, owner), pieces.gather(-1, owner).clamp(min=1)
    piece = slot - (after - pieces).gather(-1, owner)
    return torch.where(inside, (piece + 1) * count // parts - piece * count // parts, 0)
