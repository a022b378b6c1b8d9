"""The merging kernel: one list out of what several proposals list."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.select_neighbors.triton_choose import guess, highest, sort_network
from ssa_framework.ops.triton_runtime import INTERPRETED

_LAST = tl.constexpr(0x7FFFFFFF)
_LAST_WIDE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class CandidateList(NamedTuple):
    """What one proposal lists: ``keys [B, G, N, width]``, -1 = empty, in any order; pointer, strides that are 0 along
    a broadcast axis, and the width.

    ``scores``: of the same shape, with strides of their own; ``None``: to be computed, or not needed. ``listed``,
    ``scored``: words that count the chosen keys and the distinct eligible ones; ``scored`` is ``None`` where nothing
    was scored, or it was counted before.
    """

    keys: Any
    batch: Any
    head: Any
    row: Any
    width: Any
    scores: Any
    scores_batch: Any
    scores_head: Any
    scores_row: Any
    listed: Any
    scored: Any


@triton.jit
def _sort(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """``x [SIZE]`` ascending. Over several warps the network waits at twice as many barriers; the interpreter is slow
    at the many calls that `tl.sort` consists of."""
    return sort_network(x, SIZE, LOG_SIZE) if INTERPRETED else tl.sort(x)


@triton.jit
def _list_of(lists, column, LISTS: tl.constexpr):
    """The number of the list that holds each column."""
    number = tl.zeros_like(column)
    end = 0
    for i in tl.static_range(LISTS - 1):
        end += lists[i].width
        number += (column >= end).to(tl.int32)
    return number


@triton.jit
def _read(lists, b, g, row, LISTS: tl.constexpr, SIZE: tl.constexpr):
    """The keys ``[SIZE]`` of all lists of a query, one list after the other; -1 = empty."""
    column = tl.arange(0, SIZE)
    key = tl.full((SIZE,), -1, tl.int32)
    first = 0
    for i in tl.static_range(LISTS):
        inside = (column >= first) & (column < first + lists[i].width)
        line = lists[i].keys + b * lists[i].batch + g * lists[i].head + row * lists[i].row
        key = tl.where(inside, tl.load(line + (column - first), mask=inside, other=-1), key)
        first += lists[i].width
    return key


@triton.jit
def _eligible(key, allowed, b, row, CAUSAL: tl.constexpr, BAND: tl.constexpr):
    """bool like ``key``: which may be listed."""
    keep = key >= 0
    position = tl.load(allowed.positions + b * allowed.positions_batch + row)
    if CAUSAL:
        keep = keep & (key <= position)
    if BAND:
        keep = keep & ((key - position + allowed.before).to(tl.uint32) > allowed.before + allowed.after)
    if allowed.open_keys is not None:
        keep = keep & (tl.load(allowed.open_keys + b * allowed.open_keys_batch + key, mask=keep, other=0) != 0)
    if allowed.query_segments is not None:
        of_query = tl.load(allowed.query_segments + b * allowed.query_segments_batch + row)
        of_key = tl.load(allowed.key_segments + b * allowed.key_segments_batch + key, mask=keep, other=0)
        keep = keep & (of_key == of_query)
    return keep


@triton.jit
def _given(lists, column, number, competes, b, g, row, LISTS: tl.constexpr):
    """Scores that came with the lists, for the columns of keys that compete; and which keys have none."""
    score = tl.zeros(column.shape, tl.float32)
    without = competes
    first = 0
    for i in tl.static_range(LISTS):
        if lists[i].scores is not None:
            here = competes & (number == i)
            line = lists[i].scores + b * lists[i].scores_batch + g * lists[i].scores_head + row * lists[i].scores_row
            score = tl.where(here, tl.load(line + (column - first), mask=here, other=0.0).to(tl.float32), score)
            without = without & (number != i)
        first += lists[i].width
    return score, without


@triton.jit
def _products(q, k, b, g, row, key, wanted, KV_SHARE: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr):
    """``q·k`` of a query with ``key [SIZE]`` where ``wanted``, float32; a part of each row at a time."""
    q_line = q.pointer + b * q.batch + g * q.head + row * q.row
    k_lines = k.pointer + b * k.batch + g // KV_SHARE * k.head + key.to(tl.int64) * k.row
    total = tl.zeros(key.shape, tl.float32)
    for start in range(0, D, DIMS):
        dims = start + tl.arange(0, DIMS).to(tl.int64)
        inside = dims < D
        part = tl.load(q_line + dims * q.dim, mask=inside, other=0.0).to(tl.float32)
        # [SIZE, DIMS]
        rows = tl.load(k_lines[:, None] + dims[None, :] * k.dim, mask=wanted[:, None] & inside[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float32) * part[None, :], 1)
    return total


@triton.jit
def _best(x, room):
    """bool like ``x``: the ``room`` highest of more numbers above -inf, the first ones of equals."""
    taken = x > float("inf")
    if room > 0:
        total = tl.sum((x > -float("inf")).to(tl.int32), 0)
        limit, reach = guess(x, total, room)
        taken = x >= limit
        if reach != room:
            limit = highest(x, room)
            tied = x == limit
            left = room - tl.sum((x > limit).to(tl.int32), 0)
            taken = (x > limit) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= left))
    return taken


@triton.jit
def merge_kernel(
    q, k, lists, allowed, out, graph_heads, rows, counters,
    LISTS: tl.constexpr, GUARANTEED: tl.constexpr, KV_SHARE: tl.constexpr, CAUSAL: tl.constexpr, BAND: tl.constexpr,
    BUDGET: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """``out [B, G, N, BUDGET]`` for query ``program_id(0)`` and row ``program_id(1)`` of batch and graph heads.

    A key belongs to the first list that holds it. Those of the first ``GUARANTEED`` lists are taken, then the ones
    with the highest scores. ``SIZE``: at least as many columns as the lists have together.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b, g = head // graph_heads, head % graph_heads
    # [SIZE]
    column = tl.arange(0, SIZE)
    key = _read(lists, b, g, row, LISTS, SIZE)
    keep = _eligible(key, allowed, b, row, CAUSAL, BAND)
    # by key, then by column; one number for both, in 32 bits if they suffice
    if WIDE:
        both = _sort(tl.where(keep, key.to(tl.int64) * SIZE + column, _LAST_WIDE), SIZE, LOG_SIZE)
        real = both != _LAST_WIDE
    else:
        both = _sort(tl.where(keep, key * SIZE + column, _LAST), SIZE, LOG_SIZE)
        real = both != _LAST
    before = tl.gather(both, tl.maximum(tl.arange(0, SIZE) - 1, 0), 0)
    column = (both & (SIZE - 1)).to(tl.int32)
    key = tl.where(real, both >> LOG_SIZE, 0).to(tl.int32)
    number = _list_of(lists, column, LISTS)
    same_list = number == _list_of(lists, (before & (SIZE - 1)).to(tl.int32), LISTS)
    fresh = real & ((tl.arange(0, SIZE) == 0) | (both >> LOG_SIZE != before >> LOG_SIZE))
    distinct = fresh | (real & ~same_list)

    taken = fresh & (number < GUARANTEED)
    if LISTS > GUARANTEED:
        competes = fresh & (number >= GUARANTEED)
        score, without = _given(lists, column, number, competes, b, g, row, LISTS)
        score = tl.where(without, _products(q, k, b, g, row, key, without, KV_SHARE, D, DIMS), score)
        competes = competes & (score > -float("inf"))  # NaN compares with nothing
        room = BUDGET - tl.sum(taken.to(tl.int32), 0)
        if tl.sum(competes.to(tl.int32), 0) <= room:
            taken = taken | competes
        else:
            taken = taken | _best(tl.where(competes, score, -float("inf")), room)

    to = tl.cumsum(taken.to(tl.int32), 0) - 1
    line = out + (head * rows + row) * BUDGET
    tl.store(line + to, key, mask=taken)
    rank = tl.arange(0, PADDED)
    empty = (rank >= tl.sum(taken.to(tl.int32), 0)) & (rank < BUDGET)
    tl.store(line + rank, tl.full((PADDED,), -1, tl.int32), mask=empty)
    word = tl.program_id(0) % counters
    for i in tl.static_range(LISTS):
        count = tl.sum((taken & (number == i)).to(tl.int64), 0)
        tl.atomic_add(lists[i].listed + word, count, sem="relaxed")
        if lists[i].scored is not None:
            pairs = tl.sum((distinct & (number == i)).to(tl.int64), 0)
            tl.atomic_add(lists[i].scored + word, pairs, sem="relaxed")
