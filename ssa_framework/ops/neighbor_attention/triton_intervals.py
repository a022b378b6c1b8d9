"""Kernels for intervals: spans of keys and levels of summaries, as dense tiles of a block of queries.

A row of a tile is a query head of a query: the heads of a KV group are rows of one product. Keys and summaries differ
in nothing but the table that is attended and in what is left out: padding, other documents and later keys of one, the
opened ones of the other. Only summaries have weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.neighbor_attention.triton_backward import key_step
from ssa_framework.ops.neighbor_attention.triton_tiles import LN_2, LOG2_E, gather, rows_of
from ssa_framework.ops.triton_runtime import dot

REACH_ROWS = 64
"""Queries whose intervals `reach_kernel` sums up in two numbers."""

_FAR = tl.constexpr(2147483647)


class Intervals(NamedTuple):
    """R intervals of each query, ``first, stop [B, N, R]``, which share strides, of a table of ``length`` rows;
    pointers that are ``None`` are not there, strides are 0 for an axis that is broadcast.

    ``weights [B, Hkv, C]``: added to the scores of summaries. ``opened [B, G, N, P]``: summaries that are left out,
    -1 = none; its strides of a KV head and of a query head in its group.
    """

    first: Any
    stop: Any
    batch: Any
    row: Any
    level: Any
    levels: Any
    length: Any
    weights: Any
    weights_batch: Any
    weights_head: Any
    weights_number: Any
    opened: Any
    opened_batch: Any
    opened_kv_head: Any
    opened_member: Any
    opened_row: Any
    opened_slot: Any
    opened_slots: Any


@triton.jit
def _interval_of(intervals, level, batch, row, real, offset, CAUSAL: tl.constexpr):
    """First and one past the last number that queries ``row [R]`` attend on ``level``; both 0 where not ``real``."""
    at = batch * intervals.batch + row * intervals.row + level * intervals.level
    first = tl.maximum(tl.load(intervals.first + at, mask=real, other=0), 0)
    stop = tl.minimum(tl.load(intervals.stop + at, mask=real, other=0), intervals.length)
    if CAUSAL:
        stop = tl.minimum(stop, row + offset + 1)
    return first, tl.where(real, stop, 0)


@triton.jit
def _reach_of(first, stop):
    """The first and one past the last number of all intervals ``[R]``; nothing lies between if all are empty."""
    some = stop > first
    return tl.min(tl.where(some, first, _FAR), 0), tl.max(tl.where(some, stop, 0), 0)


@triton.jit
def _opened_of(intervals, batch, kv_head, row, head, real, OPENED: tl.constexpr):
    """What each query ``row [R]`` and head ``head [R]`` of the group opened, ``[R, OPENED]``; -1 = none."""
    slot = tl.arange(0, OPENED)[None, :]
    of_row = (head * intervals.opened_member).to(tl.int64) + row.to(tl.int64) * intervals.opened_row
    of_head = batch * intervals.opened_batch + kv_head * intervals.opened_kv_head
    at = of_head + of_row[:, None] + slot * intervals.opened_slot
    return tl.load(intervals.opened + at, mask=real[:, None] & (slot < intervals.opened_slots), other=-1)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _opened_bits(numbers, start):
    """``numbers [R, P]`` → two int32 ``[R]``, whose bits i say that ``start + i`` and ``start + 32 + i`` are among
    them."""
    at = numbers - start
    bit = tl.where((at >= 0) & (at < 64) & (numbers >= 0), 1 << (at & 31), 0)
    early = tl.where(at < 32, bit, 0)
    return tl.reduce(early, 1, _either), tl.reduce(bit ^ early, 1, _either)


@triton.jit
def _bits_between(first, stop):
    """int32 whose bits ``first <= i < stop`` are set, for i < 32; the limits may lie outside."""
    first, stop = tl.minimum(tl.maximum(first, 0), 32), tl.minimum(tl.maximum(stop, 0), 32)
    # a shift by 32 is not defined
    below_stop = tl.where(stop == 32, -1, (1 << (stop & 31)) - 1)
    below_first = tl.where(first == 32, -1, (1 << (first & 31)) - 1)
    return below_stop & ~below_first


@triton.jit
def _has_bit(early, late, index):
    """bool: bit ``index`` of the 64 in two int32; broadcasts."""
    return ((tl.where(index < 32, early, late) >> (index & 31)) & 1) != 0


@triton.jit
def _unmasked(fixed, batch, keys, row, real_keys, real_rows):
    """bool: not padding, nor in another document; ``keys`` and ``real_keys``, ``row`` and ``real_rows`` broadcast."""
    allowed = real_keys & real_rows
    if fixed.keep is not None:
        keep = tl.load(fixed.keep + batch * fixed.keep_batch + keys * fixed.keep_key, mask=real_keys, other=0)
        allowed = allowed & (keep != 0)
    if fixed.query_segments is not None:
        at = fixed.query_segments + batch * fixed.query_segments_batch + row * fixed.query_segments_row
        of_queries = tl.load(at, mask=real_rows, other=-1)
        at = fixed.key_segments + batch * fixed.key_segments_batch + keys * fixed.key_segments_key
        allowed = allowed & (tl.load(at, mask=real_keys, other=-1) == of_queries)
    return allowed


@triton.jit
def _weights_of(intervals, batch, kv_head, number, inside):
    """Of summaries ``number [S]``, in powers of 2; -inf beyond the last."""
    at = intervals.weights + batch * intervals.weights_batch + kv_head * intervals.weights_head
    at += number * intervals.weights_number
    return tl.load(at, mask=inside, other=-float("inf")) * LOG2_E


@triton.jit
def _free_bits(
    first, stop, intervals, of_opened, start, QUERIES: tl.constexpr, GROUP_PADDED: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Which of the 64 numbers from ``start`` on rows ``[R]`` attend, as two int32 ``[R]``: what lies in their interval
    and is not opened. Bits of a row are cheaper than comparisons of each of its scores."""
    early = _bits_between(first - start, stop - start)
    late = _bits_between(first - start - 32, stop - start - 32)
    if intervals.opened is not None:
        opened_early, opened_late = _opened_bits(of_opened, start)
        if SHARED:  # the heads of a query opened the same
            shape: tl.constexpr = (QUERIES, GROUP_PADDED)
            opened_early = tl.reshape(tl.broadcast_to(opened_early[:, None], shape), (QUERIES * GROUP_PADDED,))
            opened_late = tl.reshape(tl.broadcast_to(opened_late[:, None], shape), (QUERIES * GROUP_PADDED,))
        early, late = early & ~opened_early, late & ~opened_late
    return early, late


@triton.jit
def _scores(
    x, key_tile, weights, early, late, number, inside, row, real, fixed, intervals, batch, scale,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows ``x [R, W]`` and ``key_tile [KEYS, W]``, in powers of 2; -inf where there is no edge."""
    s = dot(x, tl.trans(key_tile), tl.zeros((x.shape[0], KEYS), tl.float32), PRECISION) * scale
    allowed = _has_bit(early[:, None], late[:, None], tl.arange(0, KEYS)[None, :])
    if intervals.weights is None:
        allowed = allowed & _unmasked(fixed, batch, number[None, :], row[:, None], inside[None, :], real[:, None])
    else:
        s += weights[None, :]
    return tl.where(allowed, s, -float("inf"))


@triton.jit
def _all_opened(
    intervals, batch, kv_head, row, head, real, end, QUERIES: tl.constexpr, OPENED: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """What the queries of a tile opened, ``[R, OPENED]``; ``[QUERIES, OPENED]`` where the heads of a query share it."""
    if SHARED:
        row = tl.min(row, 0) + tl.arange(0, QUERIES)
        head = tl.zeros((QUERIES,), tl.int32)
        real = row < end
    return _opened_of(intervals, batch, kv_head, row, head, real, OPENED)


@triton.jit
def _updated(s, value_tile, m, total, acc, FP32: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax with scores ``s [R, S]``."""
    # [R]
    new_m = tl.maximum(m, tl.max(s, 1))
    # no key so far: subtract 0, so that the weights are exp(-inf) = 0, not NaN
    finite = tl.where(new_m == -float("inf"), 0.0, new_m)
    p = tl.exp2(s - finite[:, None])
    keep = tl.exp2(m - finite)
    total = total * keep + tl.sum(p, 1)
    if FP32:
        value_tile = value_tile.to(tl.float32)
    acc = dot(p.to(value_tile.dtype), value_tile, acc * keep[:, None], PRECISION)
    return new_m, total, acc


@triton.jit
def _attend_columns(
    x, row, real, m, total, acc, k, v, fixed, batch, kv_head, scale,
    CAUSAL: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
    WV: tl.constexpr, KEYS: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the columns, less those in the span of a query. There is no band."""
    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    for start in range(0, fixed.num_columns, KEYS):
        index = start + tl.arange(0, KEYS)
        columns = tl.load(fixed.columns + index, mask=index < fixed.num_columns, other=-1)
        key_tile = gather(k_start, columns, k, K_ROW, D, W)
        value_tile = gather(v_start, columns, v, V_ROW, DV, WV)
        s = dot(x, tl.trans(key_tile), tl.zeros((x.shape[0], KEYS), tl.float32), PRECISION) * scale
        allowed = _unmasked(fixed, batch, columns[None, :], row[:, None], (columns >= 0)[None, :], real[:, None])
        if CAUSAL:
            allowed = allowed & (columns[None, :] <= (row + fixed.offset)[:, None])
        if fixed.span_start is not None:
            at = batch * fixed.span_batch + row * fixed.span_row
            first = tl.load(fixed.span_start + at, mask=real, other=0)
            stop = tl.load(fixed.span_end + at, mask=real, other=0)
            allowed = allowed & ((columns[None, :] < first[:, None]) | (columns[None, :] >= stop[:, None]))
        s = tl.where(allowed, s, -float("inf"))
        m, total, acc = _updated(s, value_tile, m, total, acc, FP32, PRECISION)
    return m, total, acc


@triton.jit
def _attend_all(
    x, row, head, real, num_queries, m, total, acc, k, v, intervals, fixed, batch, kv_head, scale,
    CAUSAL: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
    WV: tl.constexpr, QUERIES: tl.constexpr, GROUP_PADDED: tl.constexpr, KEYS: tl.constexpr, OPENED: tl.constexpr,
    SHARED: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over all intervals of one table."""
    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    of_opened = row
    if intervals.opened is not None:
        of_opened = _all_opened(intervals, batch, kv_head, row, head, real, num_queries, QUERIES, OPENED, SHARED)
    for level in range(intervals.levels):
        first, stop = _interval_of(intervals, level, batch, row, real, fixed.offset, CAUSAL)
        low, high = _reach_of(first, stop)
        weights = tl.zeros((KEYS,), tl.float32)
        if intervals.weights is not None:
            number = low + tl.arange(0, KEYS)
            weights = _weights_of(intervals, batch, kv_head, number, (number >= low) & (number < high))
        for start in range(low, high, KEYS):
            number = start + tl.arange(0, KEYS)
            inside = number < high
            some = tl.where(inside, number, -1)
            key_tile = gather(k_start, some, k, K_ROW, D, W)
            value_tile = gather(v_start, some, v, V_ROW, DV, WV)
            # [R]
            early, late = _free_bits(first, stop, intervals, of_opened, start, QUERIES, GROUP_PADDED, SHARED)
            # [R, S]
            s = _scores(
                x, key_tile, weights, early, late, number, inside, row, real, fixed, intervals, batch, scale,
                KEYS, PRECISION,
            )  # fmt: skip
            if intervals.weights is not None:  # read ahead, so that a step does not begin with waiting for them
                number += KEYS
                weights = _weights_of(intervals, batch, kv_head, number, number < high)
            m, total, acc = _updated(s, value_tile, m, total, acc, FP32, PRECISION)
    return m, total, acc


@triton.jit
def attend_intervals_kernel(
    q, k, v, summary_k, summary_v, out, lse, fixed, spans, seen, num_queries, scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CAUSAL: tl.constexpr, OFFSET: tl.constexpr, Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, SUMMARY_K_ROW: tl.constexpr, SUMMARY_V_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, OPENED: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
    FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, N, DV]`` and ``lse [B, H, N]`` over spans, summaries and, if ``COLUMNS``, columns, of ``QUERIES``
    queries from ``program_id(0)`` on, KV head ``program_id(1)``."""
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    # [R]
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES * GROUP_PADDED) // GROUP_PADDED
    head = tl.arange(0, QUERIES * GROUP_PADDED) % GROUP_PADDED
    real = (row < num_queries) & (head < GROUP)
    mine = tl.where(real, head, -1)
    # [R, W]
    x = rows_of(q.pointer + batch * q.batch + kv_head * GROUP * q.head, q, row, mine, Q_ROW, D, W, OFFSET)
    m = tl.full((QUERIES * GROUP_PADDED,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES * GROUP_PADDED,), tl.float32)
    acc = tl.zeros((QUERIES * GROUP_PADDED, WV), tl.float32)
    if COLUMNS:
        m, total, acc = _attend_columns(
            x, row, real, m, total, acc, k, v, fixed, batch, kv_head, scale * LOG2_E,
            CAUSAL, K_ROW, V_ROW, D, DV, W, WV, KEYS, FP32, PRECISION,
        )  # fmt: skip
    if spans.first is not None:
        m, total, acc = _attend_all(
            x, row, head, real, num_queries, m, total, acc, k, v, spans, fixed, batch, kv_head,
            scale * LOG2_E, CAUSAL, K_ROW, V_ROW, D, DV, W, WV, QUERIES, GROUP_PADDED,
            KEYS, OPENED, SHARED, FP32, PRECISION,
        )  # fmt: skip
    if seen.first is not None:
        m, total, acc = _attend_all(
            x, row, head, real, num_queries, m, total, acc, summary_k, summary_v, seen, fixed, batch, kv_head,
            scale * LOG2_E, False, SUMMARY_K_ROW, SUMMARY_V_ROW, D, DV, W, WV, QUERIES, GROUP_PADDED,
            KEYS, OPENED, SHARED, FP32, PRECISION,
        )  # fmt: skip
    total = tl.where(m == -float("inf"), 1.0, total)
    acc = acc / total[:, None]
    dims = tl.arange(0, WV)[None, :]
    row_at = row.to(tl.int64)
    at = batch * out.batch + (kv_head * GROUP + head) * out.head + row_at * out.row
    inside = real[:, None] & (dims < DV)
    tl.store(out.pointer + at[:, None] + dims, acc.to(out.pointer.dtype.element_ty), mask=inside)
    at = batch * lse.batch + (kv_head * GROUP + head) * lse.head + row_at * lse.row
    tl.store(lse.pointer + at, (m + tl.log2(total)) * LN_2, mask=real)


@triton.jit
def _query_gradient_all(
    x, dx, row, head, real, num_queries, row_lse, delta, acc, k, v, intervals, fixed, batch, kv_head, scale,
    CAUSAL: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
    WV: tl.constexpr, QUERIES: tl.constexpr, GROUP_PADDED: tl.constexpr, KEYS: tl.constexpr, OPENED: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of rows ``x [R, W]`` through all intervals of one table to ``acc``, without the scale."""
    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    of_opened = row
    if intervals.opened is not None:
        of_opened = _all_opened(intervals, batch, kv_head, row, head, real, num_queries, QUERIES, OPENED, SHARED)
    for level in range(intervals.levels):
        first, stop = _interval_of(intervals, level, batch, row, real, fixed.offset, CAUSAL)
        low, high = _reach_of(first, stop)
        weights = tl.zeros((KEYS,), tl.float32)
        if intervals.weights is not None:
            number = low + tl.arange(0, KEYS)
            weights = _weights_of(intervals, batch, kv_head, number, (number >= low) & (number < high))
        for start in range(low, high, KEYS):
            number = start + tl.arange(0, KEYS)
            inside = number < high
            some = tl.where(inside, number, -1)
            key_tile = gather(k_start, some, k, K_ROW, D, W)
            value_tile = gather(v_start, some, v, V_ROW, DV, WV)
            # [R]
            early, late = _free_bits(first, stop, intervals, of_opened, start, QUERIES, GROUP_PADDED, SHARED)
            # [R, S]
            s = _scores(
                x, key_tile, weights, early, late, number, inside, row, real, fixed, intervals, batch, scale,
                KEYS, PRECISION,
            )  # fmt: skip
            if intervals.weights is not None:  # read ahead, so that a step does not begin with waiting for them
                number += KEYS
                weights = _weights_of(intervals, batch, kv_head, number, number < high)
            p = tl.exp2(s - row_lse[:, None])
            dp = dot(dx, tl.trans(value_tile), tl.zeros(s.shape, tl.float32), PRECISION)
            ds = p * (dp - delta[:, None])
            acc = dot(ds.to(key_tile.dtype), key_tile, acc, PRECISION)
    return acc


@triton.jit
def interval_query_gradient_kernel(
    grad_out, grad_lse, q, k, v, summary_k, summary_v, out, lse, grad_q, statistics, fixed, spans, seen,
    num_queries, scale, grad_scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CAUSAL: tl.constexpr, OFFSET: tl.constexpr, Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, SUMMARY_K_ROW: tl.constexpr, SUMMARY_V_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, OPENED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad_q``, times ``grad_scale``, and ``statistics`` as `query_gradient_kernel` has them; programs as in
    `attend_intervals_kernel`."""
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    # [R]
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES * GROUP_PADDED) // GROUP_PADDED
    head = tl.arange(0, QUERIES * GROUP_PADDED) % GROUP_PADDED
    real = (row < num_queries) & (head < GROUP)
    mine = tl.where(real, head, -1)
    row_at = row.to(tl.int64)
    head_at = kv_head * GROUP + head
    # [R, W], [R, WV]
    x = rows_of(q.pointer + batch * q.batch + kv_head * GROUP * q.head, q, row, mine, Q_ROW, D, W, OFFSET)
    dims = tl.arange(0, WV)[None, :]
    inside = real[:, None] & (dims < DV)
    at = (batch * grad_out.batch + head_at * grad_out.head + row_at * grad_out.row)[:, None] + dims * grad_out.dim
    dx = tl.load(grad_out.pointer + at, mask=inside, other=0.0)
    at = (batch * out.batch + head_at * out.head + row_at * out.row)[:, None] + dims * out.dim
    y = tl.load(out.pointer + at, mask=inside, other=0.0)
    at = batch * grad_lse.batch + head_at * grad_lse.head + row_at * grad_lse.row
    delta = tl.sum(dx.to(tl.float32) * y.to(tl.float32), 1) - tl.load(grad_lse.pointer + at, mask=real, other=0.0)
    at = batch * lse.batch + head_at * lse.head + row_at * lse.row
    row_lse = tl.load(lse.pointer + at, mask=real, other=0.0) * LOG2_E
    # a query without neighbors: its weights are exp(-huge) = 0
    row_lse = tl.where(row_lse == -float("inf"), 1e30, row_lse)
    group_row = (batch * tl.num_programs(1) + kv_head) * num_queries + row
    place = statistics + (group_row * GROUP + head) * 2
    tl.store(place, row_lse, mask=real)
    tl.store(place + 1, delta, mask=real)
    acc = tl.zeros((QUERIES * GROUP_PADDED, W), tl.float32)
    if spans.first is not None:
        acc = _query_gradient_all(
            x, dx, row, head, real, num_queries, row_lse, delta, acc, k, v, spans, fixed, batch, kv_head,
            scale * LOG2_E, CAUSAL, K_ROW, V_ROW, D, DV, W, WV, QUERIES,
            GROUP_PADDED, KEYS, OPENED, SHARED, PRECISION,
        )  # fmt: skip
    if seen.first is not None:
        acc = _query_gradient_all(
            x, dx, row, head, real, num_queries, row_lse, delta, acc, summary_k, summary_v, seen, fixed, batch,
            kv_head, scale * LOG2_E, False, SUMMARY_K_ROW, SUMMARY_V_ROW, D, DV, W, WV, QUERIES,
            GROUP_PADDED, KEYS, OPENED, SHARED, PRECISION,
        )  # fmt: skip
    dims = tl.arange(0, W)[None, :]
    at = (batch * grad_q.batch + head_at * grad_q.head + row_at * grad_q.row)[:, None] + dims
    acc = (acc * grad_scale).to(grad_q.pointer.dtype.element_ty)
    tl.store(grad_q.pointer + at, acc, mask=real[:, None] & (dims < D))


@triton.jit
def reach_kernel(intervals, reach, num_queries, offset, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """``reach [B, R, blocks, 2]``: the first and one past the last number that a block of ``ROWS`` queries attends."""
    block = tl.program_id(0)
    level = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    first, stop = _interval_of(intervals, level, batch, row, row < num_queries, offset, CAUSAL)
    low, high = _reach_of(first, stop)
    place = reach + ((batch * tl.num_programs(1) + level) * tl.num_programs(0) + block) * 2
    tl.store(place, low)
    tl.store(place + 1, high)


@triton.jit
def _rows_that_reach(reach, blocks, low, high, ROWS: tl.constexpr):
    """The first and one past the last query of the blocks of queries that attend some number in ``[low, high)``."""
    first = tl.full((), _FAR, tl.int32)
    last = tl.zeros((), tl.int32)
    for start in range(0, blocks, 256):
        block = start + tl.arange(0, 256)
        begin = tl.load(reach + 2 * block, mask=block < blocks, other=_FAR)
        end = tl.load(reach + 2 * block + 1, mask=block < blocks, other=0)
        touches = (begin < high) & (end > low)
        first = tl.minimum(first, tl.min(tl.where(touches, block * ROWS, _FAR), 0))
        last = tl.maximum(last, tl.max(tl.where(touches, block * ROWS + ROWS, 0), 0))
    return first, last


@triton.jit
def interval_key_gradient_kernel(
    grad_out, q, k, v, statistics, partial_k, partial_v, fixed, intervals, reach, reach_batch, blocks,
    kv_heads, num_queries, scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CAUSAL: tl.constexpr, Q_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr, OFFSET: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, OPENED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK`` rows of a table (of keys or of summaries) from ``program_id(1)`` on, through part
    ``program_id(0)`` of the queries that reach them: ``partial_k, partial_v``, float32 ``[splits, B·Hkv, C, W or WV]``.

    ``reach``: of `reach_kernel`. The parts are added up afterwards, in their order.
    """
    split = tl.program_id(0)
    head_index = tl.program_id(2)
    batch = (head_index // kv_heads).to(tl.int64)
    kv_head = (head_index % kv_heads).to(tl.int64)
    low = tl.program_id(1) * BLOCK
    # [S]
    number = low + tl.arange(0, BLOCK)
    inside = number < intervals.length
    some = tl.where(inside, number, -1)
    # [S, W], [S, WV]
    key_tile = gather(k.pointer + batch * k.batch + kv_head * k.head, some, k, K_ROW, D, W)
    value_tile = gather(v.pointer + batch * v.batch + kv_head * v.head, some, v, V_ROW, DV, WV)
    acc_k = tl.zeros((BLOCK, W), tl.float32)
    acc_v = tl.zeros((BLOCK, WV), tl.float32)
    first_head = kv_head * GROUP
    q_start = q.pointer + batch * q.batch + first_head * q.head
    grad_start = grad_out.pointer + batch * grad_out.batch + first_head * grad_out.head
    of_head = statistics + (batch * kv_heads + kv_head) * num_queries * (2 * GROUP)
    weight = None
    if intervals.weights is not None:
        weight = _weights_of(intervals, batch, kv_head, number, inside)
    # [R]
    head = tl.arange(0, QUERIES * GROUP_PADDED) % GROUP_PADDED
    for level in range(intervals.levels):
        of_level = reach + batch * reach_batch + level * blocks * 2
        first_row, last_row = _rows_that_reach(of_level, blocks, low, low + BLOCK, ROWS)
        last_row = tl.minimum(last_row, num_queries)
        share = tl.cdiv(tl.maximum(last_row - first_row, 0), tl.num_programs(0) * QUERIES) * QUERIES
        begin = tl.minimum(first_row, num_queries) + split * share
        end = tl.minimum(begin + share, last_row)
        for start in range(begin, end, QUERIES):
            row = start + tl.arange(0, QUERIES * GROUP_PADDED) // GROUP_PADDED
            real = (head < GROUP) & (row < end)
            first, stop = _interval_of(intervals, level, batch, row, real, fixed.offset, CAUSAL)
            of_opened = row
            if intervals.opened is not None:
                of_opened = _all_opened(intervals, batch, kv_head, row, head, real, end, QUERIES, OPENED, SHARED)
            early, late = _free_bits(first, stop, intervals, of_opened, low, QUERIES, GROUP_PADDED, SHARED)
            # [S, R]
            allowed = _has_bit(early[None, :], late[None, :], (number - low)[:, None]) & inside[:, None]
            if intervals.weights is None:
                free = _unmasked(fixed, batch, number[:, None], row[None, :], inside[:, None], real[None, :])
                allowed = allowed & free
            acc_k, acc_v = key_step(
                row, tl.where(real, head, -1), allowed, weight, key_tile, value_tile, acc_k, acc_v,
                q, q_start, grad_out, grad_start, of_head, scale * LOG2_E,
                GROUP, Q_ROW, GRAD_ROW, OFFSET, D, DV, W, WV, PRECISION,
            )  # fmt: skip
    place = ((split * tl.num_programs(2) + head_index).to(tl.int64) * intervals.length + number)[:, None]
    tl.store(partial_k + place * W + tl.arange(0, W)[None, :], acc_k * scale, mask=inside[:, None])
    tl.store(partial_v + place * WV + tl.arange(0, WV)[None, :], acc_v, mask=inside[:, None])
