"""The ranking kernel: scores of a tile of clusters, of which the best stay in registers; no row of scores in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import dot

_LOWEST = tl.constexpr(-(2**63))
_LAST = tl.constexpr(2**31 - 1)


class Table(NamedTuple):
    """Clusters of each KV head, contiguous: ``centroids`` and ``variances`` float32 ``[B, Hkv, S, D]`` (``None``: they
    do not count), ``start`` and ``size`` int32 ``[B, Hkv, S]``; and S."""

    centroids: Any
    variances: Any
    start: Any
    size: Any
    slots: Any


class Limits(NamedTuple):
    """``low, high`` int32 ``[B, N, R]``, which share strides (0 = broadcast); and R."""

    low: Any
    high: Any
    batch: Any
    row: Any
    range: Any
    ranges: Any


@triton.jit
def _limits_of(limits, index, batch, row, real, slots):
    at = batch * limits.batch + row * limits.row + index * limits.range
    low = tl.maximum(tl.load(limits.low + at, mask=real, other=0), 0)
    high = tl.minimum(tl.load(limits.high + at, mask=real, other=0), slots)
    return low, high


@triton.jit
def _ranked(scores, number):
    """int64 that compare as float32 ``scores`` do, and of equal ones the lower ``number`` as the larger."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 equals 0
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (number ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _scores(
    x, x_dim, real, table, of_head, number, inside, spread,
    D: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[ROWS, CLUSTERS]`` of queries at ``x [ROWS, 1]`` and clusters ``number``, ``DIMS`` coordinates at a time."""
    scores = tl.zeros((x.shape[0], number.shape[0]), tl.float32)
    for first in range(0, D, DIMS):
        dims = first + tl.arange(0, DIMS)[None, :]
        # [ROWS, DIMS], [CLUSTERS, DIMS]
        some = tl.load(x + dims * x_dim, mask=real[:, None] & (dims < D), other=0.0).to(tl.float32)
        at = of_head * D + number[:, None].to(tl.int64) * D + dims
        there = inside[:, None] & (dims < D)
        scores = dot(some, tl.trans(tl.load(table.centroids + at, mask=there, other=0.0)), scores, PRECISION)
        if table.variances is not None:
            variances = tl.load(table.variances + at, mask=there, other=0.0)
            scores = dot(spread * some * some, tl.trans(variances), scores, PRECISION)
    return scores


@triton.jit
def rank_kernel(
    q, q_batch, q_head, q_row, q_dim, table, limits, numbers, starts, ends, num_queries, kv_heads, budget, most, spread,
    D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``numbers, starts, ends``: int32 ``[B, G, N, most]``, for ``ROWS`` queries from ``program_id(0)`` on.

    A row keeps ``KEPT`` clusters, in no order, and the smallest of them is what the next one must beat. The keys of a
    cluster, as `_ranked` has them, are all different, so the smallest is one place.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    of_head = (batch * kv_heads + head // (tl.num_programs(1) // kv_heads)) * table.slots
    sizes = table.size + of_head
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_queries
    # [ROWS, 1]
    x = q + (batch * q_batch + head * q_head + row[:, None].to(tl.int64) * q_row)
    # [ROWS, KEPT]
    kept = tl.full((ROWS, KEPT), _LOWEST, tl.int64) + 1 + tl.arange(0, KEPT).to(tl.int64)[None, :]
    smallest = tl.min(kept, 1)
    for index in range(limits.ranges):
        low, high = _limits_of(limits, index, batch, row, real, table.slots)
        some = high > low
        first = tl.min(tl.where(some, low, _LAST), 0)
        last = tl.max(tl.where(some, high, 0), 0)
        for start in range(first, last, CLUSTERS):
            number = start + tl.arange(0, CLUSTERS)
            inside = number < last
            size = tl.load(sizes + number, mask=inside, other=0)
            # [ROWS, CLUSTERS]
            scores = _scores(x, q_dim, real, table, of_head, number, inside, spread, D, DIMS, PRECISION)
            allowed = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None]) & (size > 0)[None, :]
            for earlier in range(index):  # what an earlier range holds has been seen
                begin, end = _limits_of(limits, earlier, batch, row, real, table.slots)
                allowed = allowed & ((number[None, :] < begin[:, None]) | (number[None, :] >= end[:, None]))
            allowed = allowed & (scores > -float("inf"))  # and no NaN
            ranked = tl.where(allowed, _ranked(scores, number[None, :]), _LOWEST)
            best = tl.max(ranked, 1)
            while tl.max((best > smallest).to(tl.int32), 0) > 0:
                replaced = (kept == smallest[:, None]) & (best > smallest)[:, None]
                kept = tl.where(replaced, best[:, None], kept)
                ranked = tl.where(ranked == best[:, None], _LOWEST, ranked)
                smallest = tl.min(kept, 1)
                best = tl.max(ranked, 1)
    left = tl.zeros((ROWS,), tl.int32) + budget
    out = ((batch * tl.num_programs(1) + head) * num_queries + row) * most
    for slot in range(most):
        best = tl.max(kept, 1)
        kept = tl.where(kept == best[:, None], _LOWEST, kept)
        number = (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
        found = real & (best > tl.full((), _LOWEST, tl.int64) + KEPT)
        size = tl.load(sizes + number, mask=found, other=0)
        # the first that does not fit ends the row: nothing is left then
        fits = found & (size <= left)
        left = tl.where(fits, left - size, -1)
        start = tl.load(table.start + of_head + number, mask=fits, other=0)
        tl.store(numbers + out + slot, tl.where(fits, number, -1), mask=real)
        tl.store(starts + out + slot, start, mask=real)
        tl.store(ends + out + slot, tl.where(fits, start + size, 0), mask=real)
