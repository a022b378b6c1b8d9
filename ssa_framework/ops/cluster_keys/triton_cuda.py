"""CUDA: k-means of all segments at once; the host never waits.

Where a program holds all centroids of a segment, it takes the segment, or a part of a long one, through the steps. Many
centroids pass by in chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ssa_framework.ops import triton_runtime
from ssa_framework.ops.cluster_keys.triton_gather import Found, members_kernel, order_kernel, piece_kernel
from ssa_framework.ops.cluster_keys.triton_lloyd import (
    Centroids,
    Segments,
    assign_kernel,
    lloyd_kernel,
    move_kernel,
    sum_kernel,
)
from ssa_framework.ops.cluster_keys.triton_many import Parts, begin_kernel, mean_kernel, nearest_kernel
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots

_MAX_CENTROIDS = 64 * 128
"""Coordinates of the centroids of a segment, padded, that fit a program; more pass by in chunks."""

_MAX_IN_CHUNKS = 1024
"""Centroids of a segment that are served in chunks: a program of one warp reads how many keys each of them has."""

_MAX_WIDTH = 256
"""Coordinates of a key, where centroids pass by in chunks."""

_CHUNK = 64
"""Centroids that a tile of keys is compared with at a time."""

_STAGES = 2
"""Chunks that are copied ahead, the one in use among them."""

_ROWS_OF_A_WARP = 16
"""Keys of a tile that each warp of a program compares with a chunk."""

_WHOLE = 2048
"""Keys that one program takes through a step; it is all of a shorter segment's steps."""

_PART = 1024
"""Keys of a longer segment that a program takes. It must not depend on the call: sums would round differently."""

_MAX_GRID = 65535


def why_not(k: Tensor, clusters: int) -> str | None:
    """Why the kernels cannot cluster ``k [B, Hkv, M, D]``, if they cannot."""
    if k.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it reads float16, bfloat16 and float32, got {k.dtype}"
    dim = k.shape[3]
    if not _at_once(clusters, dim) and (clusters > _MAX_IN_CHUNKS or dim > _MAX_WIDTH):
        return (
            f"it serves up to {_MAX_CENTROIDS} coordinates of the centroids of a segment, or {_MAX_IN_CHUNKS} "
            f"centroids of up to {_MAX_WIDTH} coordinates, got {clusters} of {dim}"
        )
    if max(k.shape[:2]) > _MAX_GRID:
        return f"it serves up to {_MAX_GRID} batch elements and heads, got {list(k.shape)}"
    if k.device.type != "cuda" and not (k.device.type == "cpu" and triton_runtime.INTERPRETED.value):
        return f"it needs CUDA tensors (or, to try it on a CPU, TRITON_INTERPRET=1), got {k.device}"
    if k.device.type == "cuda":
        return _why_not_device(k.device, _shared_memory(clusters, dim, _parts(k)))
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


def _at_once(clusters: int, dim: int) -> bool:
    """Whether a program holds all centroids of a segment."""
    return _padded(clusters) * _padded(dim) <= _MAX_CENTROIDS


def _shared_memory(clusters: int, dim: int, parts: int) -> int:
    """Bytes, about, that a program takes: two parts of its centroids, the keys of a tile, and who owns them."""
    columns, width = _padded(clusters), _padded(dim)
    if _at_once(clusters, dim):
        return 4 * columns * width + 2 * 2 * 64 * width + 2 * 64 * columns + 4096
    return 2 * width * (2 * _STAGES * _CHUNK + parts * _rows(width)) + 1024


def _rows(width: int) -> int:
    """Keys of a tile where centroids pass by in chunks, as registers and shared memory allow."""
    return 128 if width <= 128 else 64


def _places(length: int) -> int:
    """Owners that a program reads at a time, looking for those of its centroid."""
    return min(1024, _padded(length))


def _parts(k: Tensor) -> int:
    """bfloat16 tensors that the keys are multiplied as."""
    return 1 if k.dtype == torch.bfloat16 else 2


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


@triton_runtime.launches
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
    starts_batch = starts.stride(0) if starts.shape[0] > 1 else 0
    segments = Segments._make((k, *k.stride(), starts, starts_batch, count, length))
    owners = empty(count, length, dtype=torch.int16)
    shape: dict[str, Any] = {"D": dim, "W": width, "CLUSTERS": columns}
    if _at_once(clusters, dim):
        counts = _cluster_at_once(segments, clusters, steps, stride, owners, shape)
    else:
        counts = _cluster_in_chunks(segments, clusters, steps, stride, owners, order, shape)
    found = Found._make((order, start, size, *tables, slots))
    order_kernel[(count * clusters, heads, batch)](
        segments, owners, counts, counts.shape[3], clusters, capacity, found,
        CLUSTERS=columns, PLACES=_places(length), num_warps=1,
    )  # fmt: skip
    piece_kernel[(count * slots, heads, batch)](segments, found, D=dim, W=width, KEYS=16, num_warps=1)
    return Clusters(order, start, size, *tables)


def _cluster_at_once(
    segments: Segments, clusters: int, steps: list[int], stride: int, owners: Tensor, shape: dict[str, Any]
) -> Tensor:
    """Fill ``owners`` by programs that hold all centroids; returns how many keys each has, int32
    ``[B, Hkv, F, parts, columns]``."""
    batch, heads, count, length = owners.shape
    width, columns = shape["W"], shape["CLUSTERS"]
    empty = functools.partial(torch.empty, dtype=torch.float32, device=owners.device)
    coarse = [some for some in steps if some != length]
    whole = length <= _WHOLE
    inside = len(steps) if whole else len(coarse)
    parts = 1 if whole else triton.cdiv(length, _PART)
    table, middle = (empty((batch, heads, count, *more, width)) for more in ((columns,), ()))
    centroids = Centroids(table, middle, clusters)
    counts = empty((batch, heads, count, parts, columns), dtype=torch.int32)
    shape = {**shape, "KEYS": 64, "PARTS": _parts(segments.k), "num_warps": 4, "num_stages": 2}
    lloyd_kernel[(count, heads, batch)](
        segments, centroids, owners, counts, len(coarse), coarse[0] if coarse else 0, stride, inside,
        LAST=whole, **shape,
    )  # fmt: skip
    if not whole:
        sums, sizes = (empty((batch, heads, count, parts, columns, *more)) for more in ((width,), ()))
        grid = (count * parts, heads, batch)
        for _ in range(len(steps) - inside):
            sum_kernel[grid](segments, centroids, sums, sizes, parts, _PART, **shape)
            move_kernel[(batch * heads * count * (columns // 16),)](
                centroids, sums, sizes, parts, W=width, CLUSTERS=columns, ROWS=16, PARTS=shape["PARTS"], num_warps=4
            )
        assign_kernel[grid](segments, centroids, owners, counts, parts, _PART, **shape)
    return counts


def _cluster_in_chunks(
    segments: Segments, clusters: int, steps: list[int], stride: int, owners: Tensor, scratch: Tensor,
    shape: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Fill ``owners`` by programs that hold ``_CHUNK`` centroids; returns how many keys each has, int32
    ``[B, Hkv, F, 1, columns]``. ``scratch``: int32, as many as ``owners``."""
    batch, heads, count, length = owners.shape
    width, columns, parts = shape["W"], shape["CLUSTERS"], _parts(segments.k)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=owners.device)
    high, low = (empty((batch, heads, count, columns, width), dtype=torch.bfloat16) for _ in range(2))
    bias, middle = (empty((batch, heads, count, more)) for more in (columns, width))
    table = Parts(high, low, bias, middle, clusters)
    counts = torch.zeros((len(steps) + 1, batch, heads, count, 1, columns), dtype=torch.int32, device=owners.device)
    rows, chunk = _rows(width), min(_CHUNK, columns)
    begin_kernel[(count, heads, batch)](segments, table, **shape, ROWS=chunk, PARTS=parts, num_warps=4)
    for step, keys in enumerate([*steps, length]):
        apart = 1 if keys == length else stride
        tiles = triton.cdiv(keys, rows)
        nearest_kernel[(count * tiles, heads, batch)](
            segments, table, owners, counts[step], tiles, keys, apart,
            **shape, KEYS=rows, CHUNK=chunk, PARTS=parts, num_warps=rows // _ROWS_OF_A_WARP, num_stages=_STAGES,
        )  # fmt: skip
        if step < len(steps):
            mean_kernel[(count * clusters, heads, batch)](
                segments, table, owners, counts[step], scratch, keys, apart,
                **shape, KEYS=32, PLACES=_places(length), PARTS=parts, num_warps=1,
            )  # fmt: skip
    return counts[-1]


@triton_runtime.launches
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
