"""Ranking kernels for few queries: the clusters are shared out among programs, then one program a query opens the best.

`triton_rank` walks all clusters of a head in one program, which pays where it scores many queries on the way. Scores
are the same bits here and there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.rank_clusters.triton_rank import (
    LAST,
    LOWEST_ENTRY,
    limits_of,
    ordered_as_int,
    parts_of,
    score_tile,
)


class Kept(NamedTuple):
    """Clusters of each KV head, contiguous: ``centroids`` float32 ``[B, Hkv, S, D]``, ``variances`` like them
    (``None``: they do not count), ``start`` and ``size`` int32 ``[B, Hkv, S]``; and S."""

    centroids: Any
    variances: Any
    start: Any
    size: Any
    slots: Any


@triton.jit
def _range_of(limits, index, batch, rows, real, slots):
    """First and one past the last slot that any query sees of a range; both 0 where none sees one."""
    low, high = limits_of(limits, index, batch, rows, real, slots)
    some = high > low
    last = tl.max(tl.where(some, high, 0), 0)
    return tl.minimum(tl.min(tl.where(some, low, LAST), 0), last), last


@triton.jit
def score_few_kernel(
    q, q_batch, q_head, q_row, q_dim, kept, limits, entries, room, kv_heads, num_queries, spread,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``entries``: int64 ``[B, G, N, room]``, of each cluster that a query may open its score, above its number, so
    that they compare as in the ranking; the lowest number there is for others. The ranges of all queries of a head
    follow one another there, in whole tiles; no two share a cluster. A program takes every ``num_programs``-th tile."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    real = rows < num_queries
    dims = tl.arange(0, W)
    at = q + (batch * q_batch + head * q_head) + rows[:, None].to(tl.int64) * q_row + dims[None, :] * q_dim
    x = tl.load(at, mask=real[:, None] & (dims < D)[None, :], other=0.0)
    wide = x.to(tl.float32)
    rest = x
    if PARTS == 2:
        x, rest = parts_of(wide)
    squares = (spread * wide * wide).to(tl.bfloat16)
    of_head = (batch * kv_heads + head // (tl.num_programs(1) // kv_heads)) * kept.slots
    out = entries + ((batch * tl.num_programs(1) + head) * num_queries + rows[:, None]) * room
    programs = tl.num_programs(0)
    before = tl.program_id(0) * 0
    for index in range(limits.ranges):
        from_slot, to_slot = _range_of(limits, index, batch, rows, real, kept.slots)
        least, most = limits_of(limits, index, batch, rows, real, kept.slots)
        tiles = tl.cdiv(to_slot - from_slot, CLUSTERS)
        mine = (tl.program_id(0) + programs - before % programs) % programs
        for tile in range(mine, tiles, programs):
            number = from_slot + tile * CLUSTERS + tl.arange(0, CLUSTERS)
            size = tl.load(kept.size + of_head + number, mask=number < to_slot, other=0)
            # [CLUSTERS, W]; an empty slot is not worth a row
            cells = (of_head + number)[:, None] * D + dims[None, :]
            some = (size > 0)[:, None] & (dims < D)[None, :]
            high, low = parts_of(tl.load(kept.centroids + cells, mask=some, other=0.0))
            variances = None
            if kept.variances is not None:
                variances = tl.trans(tl.load(kept.variances + cells, mask=some, other=0.0).to(tl.bfloat16))
            # [ROWS, CLUSTERS]
            scores = score_tile(x, rest, squares, tl.trans(high), tl.trans(low), variances, CLUSTERS, PARTS)
            allowed = (number[None, :] >= least[:, None]) & (number[None, :] < most[:, None]) & (size > 0)[None, :]
            allowed = allowed & (scores > -float("inf"))  # and no NaN
            entry = (ordered_as_int(scores).to(tl.int64) << 32) | (number ^ 0x7FFFFFFF)[None, :].to(tl.int64)
            place = (before + tile) * CLUSTERS + tl.arange(0, CLUSTERS)
            tl.store(
                out + place[None, :],
                tl.where(allowed, entry, LOWEST_ENTRY),
                mask=real[:, None] & (place < room)[None, :],
            )
        before += tiles


@triton.jit
def open_few_kernel(
    kept, limits, entries, opened, room, kv_heads, num_queries,
    ROWS: tl.constexpr, CLUSTERS: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """``opened``: int32 ``[B, G, N, most]``, of query ``program_id(0)``, head ``program_id(1)``, from the ``entries``
    of `score_few_kernel`, ``room`` for each query. The best is looked for, time after time, below the one before; few
    fit the budget."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    rows = tl.arange(0, ROWS)
    count = row * 0
    for r in range(limits.ranges):
        from_slot, to_slot = _range_of(limits, r, batch, rows, rows < num_queries, kept.slots)
        count += tl.cdiv(to_slot - from_slot, CLUSTERS) * CLUSTERS
    count = tl.minimum(count, room)
    of_head = (batch * kv_heads + head // (heads // kv_heads)) * kept.slots
    line = (batch * heads + head) * num_queries + row
    entries += line * room
    chunk = tl.arange(0, CHUNK)
    slot = tl.arange(0, MOST)
    numbers = tl.full((MOST,), -1, tl.int32)
    starts = tl.zeros((MOST,), tl.int32)
    ends = tl.zeros((MOST,), tl.int32)
    left = (row * 0).to(tl.int64) + opened.budget
    previous = (row * 0).to(tl.int64) - 1  # of a bit pattern above all
    previous = previous ^ LOWEST_ENTRY
    place = row * 0
    while place < opened.most:
        best = tl.full((CHUNK,), LOWEST_ENTRY, tl.int64)
        for first in range(0, count, CHUNK):
            entry = tl.load(entries + first + chunk, mask=first + chunk < count, other=LOWEST_ENTRY)
            best = tl.maximum(best, tl.where(entry < previous, entry, LOWEST_ENTRY))
        previous = tl.max(best, 0)
        found = previous > LOWEST_ENTRY
        number = (previous & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
        size = tl.load(kept.size + of_head + number, mask=found, other=0)
        start = tl.load(kept.start + of_head + number, mask=found, other=0)
        # the first that does not fit ends the row
        fits = found & (size <= left)
        left -= size
        here = (slot == place) & fits
        numbers = tl.where(here, number, numbers)
        starts = tl.where(here, start, starts)
        ends = tl.where(here, start + size, ends)
        place = tl.where(fits, place + 1, opened.most)
    out = line * opened.most + slot
    tl.store(opened.numbers + out, numbers, mask=slot < opened.most)
    tl.store(opened.start + out, starts, mask=slot < opened.most)
    tl.store(opened.end + out, ends, mask=slot < opened.most)
