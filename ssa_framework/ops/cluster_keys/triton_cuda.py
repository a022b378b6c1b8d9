"""CUDA: k-means of all segments, a part of a long one in each program; the host never waits."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.triton_gather import Found, gather_kernel, members_kernel
from ssa_framework.ops.cluster_keys.triton_lloyd import (
    Centroids,
    Segments,
    assign_kernel,
    lloyd_kernel,
    move_kernel,
    sum_kernel,
)
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots

_MAX_CENTROIDS = 128 * 128
"""Coordinates of the centroids of a segment, padded, that fit a program."""

_WHOLE = 2048
"""Keys that one program takes through a step; it is all of a shorter segment's steps."""

_PART = 1024
"""Keys of a longer segment that a program takes. It must not depend on the call: sums would round differently."""

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
    if k.device.type == "cuda":
        return _why_not_device(k.device, _shared_memory(_padded(clusters), _padded(k.shape[3])))
    return None


@functools.lru_cache
def _why_not_device(device: torch.device, wanted: int) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and (properties.major, properties.minor) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    memory = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    if memory < wanted:
        return f"it needs {wanted} bytes of shared memory, the GPU has {memory}"
    return None


def _shared_memory(clusters: int, width: int) -> int:
    """Bytes, about, that a program takes: both parts of the centroids, the keys of a tile, and who owns them."""
    return 4 * clusters * width + 2 * 2 * 64 * width + 2 * 64 * clusters + 4096


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def cluster(
    k: Tensor, starts: Tensor, length: int, clusters: int, steps: list[int], stride: int, capacity: int
) -> Clusters:
    """See `ssa_framework.ops.cluster_keys.api.cluster_keys`; ``steps``: how many keys each Lloyd step looks at, all of
    them or every ``stride``-th."""
    batch, heads, keys, dim = k.shape
    count = starts.shape[1]
    slots = cluster_slots(length, clusters, capacity)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=k.device)

    order, start, size = empty(count * length), empty(count * slots), empty(count * slots)
    tables = [empty(count * slots, dim, dtype=torch.float32) for _ in range(2)]
    if keys < length or not k.numel() or not count:
        return Clusters(order.zero_(), start.zero_(), size.zero_(), *(table.zero_() for table in tables))
    columns, width = _padded(clusters), _padded(dim)
    coarse = [some for some in steps if some != length]
    whole = length <= _WHOLE
    inside = len(steps) if whole else len(coarse)
    parts = 1 if whole else triton.cdiv(length, _PART)
    starts_batch = starts.stride(0) if starts.shape[0] > 1 else 0
    segments = Segments._make((k, *k.stride(), starts, starts_batch, count, length))
    centroids = Centroids(
        empty(count, columns, width, dtype=torch.float32), empty(count, width, dtype=torch.float32), clusters
    )
    owners, counts = empty(count, length, dtype=torch.int16), empty(count, parts, columns)
    shape: dict[str, Any] = {
        "D": dim, "W": width, "KEYS": 64, "CLUSTERS": columns, "PARTS": 1 if k.dtype == torch.bfloat16 else 2,
        "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    lloyd_kernel[(count, heads, batch)](
        segments, centroids, owners, counts, len(coarse), coarse[0] if coarse else 0, stride, inside,
        LAST=whole, **shape,
    )  # fmt: skip
    if not whole:
        sums, sizes = (empty(count, parts, columns, *more, dtype=torch.float32) for more in ((width,), ()))
        grid = (count * parts, heads, batch)
        for _ in range(len(steps) - inside):
            sum_kernel[grid](segments, centroids, sums, sizes, parts, _PART, **shape)
            move_kernel[(batch * heads * count * (columns // 16),)](
                centroids, sums, sizes, parts, W=width, CLUSTERS=columns, ROWS=16, PARTS=shape["PARTS"], num_warps=4
            )
        assign_kernel[grid](segments, centroids, owners, counts, parts, _PART, **shape)
    gather_kernel[(count * clusters, heads, batch)](
        segments, owners, counts, parts, clusters, capacity, Found._make((order, start, size, *tables, slots)),
        D=dim, W=width, KEYS=16, PLACES=min(1024, triton.next_power_of_2(length)), CLUSTERS=columns, num_warps=1,
    )  # fmt: skip
    return Clusters(order, start, size, *tables)


def members(order: Tensor, start: Tensor, size: Tensor, keys: int, first: int) -> Tensor:
    """See `ssa_framework.ops.cluster_keys.members.cluster_members`."""
    batch, heads, slots = size.shape
    found = torch.full((batch, heads, keys), -1, dtype=torch.int32, device=size.device)
    if slots and batch and heads:
        members_kernel[(slots, heads, batch)](
            found, found.stride(0), found.stride(1), order.contiguous(), start.contiguous(), size.contiguous(), first,
            slots, order.shape[2], PLACES=32, num_warps=1,
        )  # fmt: skip
    return found
