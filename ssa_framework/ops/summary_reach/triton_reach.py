"""The kernels: the last key of each group, and whether a query attends a group that ends after it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_kernel(members, last, num_keys, count, KEYS: tl.constexpr):
    """``last [B, C]``: the last key of each group in ``members [B, Hkv · R, M]``; it starts as -1. The order of the
    updates does not matter."""
    batch = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    row = batch * tl.num_programs(1) + tl.program_id(1)
    group = tl.load(members + row * num_keys + key, mask=key < num_keys, other=-1)
    tl.atomic_max(last + batch * count + group, key, mask=group >= 0, sem="relaxed")


@triton.jit
def later_kernel(
    last, first, stop, positions, found, num_queries, count, LAST_BATCH, INTERVAL_BATCH, POSITION_BATCH,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Writes 1 to ``found`` where a query attends a group whose ``last`` key is after it. ``first, stop [B or 1, N,
    R]``, level ``program_id(1)``; the ``.._BATCH`` are 0 for what all batch elements share, else 1."""
    level = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = row < num_queries
    at = (batch * INTERVAL_BATCH * num_queries + row) * tl.num_programs(1) + level
    low = tl.maximum(tl.load(first + at, mask=real, other=0), 0)
    high = tl.minimum(tl.load(stop + at, mask=real, other=0), count)
    position = tl.load(positions + batch * POSITION_BATCH * num_queries + row, mask=real, other=0)
    begin = tl.min(tl.where(high > low, low, count), 0)
    end = tl.max(tl.where(high > low, high, 0), 0)
    later = tl.zeros((QUERIES,), tl.int32)
    for start in range(begin, end, GROUPS):
        group = start + tl.arange(0, GROUPS)
        key = tl.load(last + batch * LAST_BATCH * count + group, mask=group < end, other=-1)
        # [QUERIES, GROUPS]
        attended = (group[None, :] >= low[:, None]) & (group[None, :] < high[:, None])
        later += tl.sum((attended & (key[None, :] > position[:, None])).to(tl.int32), 1)
    if tl.max(later, 0) > 0:
        tl.store(found, 1)
