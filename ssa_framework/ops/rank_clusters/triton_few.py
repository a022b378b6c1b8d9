"""Ranking kernels for few queries: the clusters are shared out among programs, which score them and choose the best of
their share; then one program a query opens the best of these.

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
def _tiles_of(limits, batch, rows, num_queries, slots, CLUSTERS: tl.constexpr, RANGES: tl.constexpr):
    """int32 ``[RANGES]`` each: the first slot that any of the queries ``rows`` sees of a range, one past the last, and
    how many tiles all ranges up to this one have."""
    index = tl.arange(0, RANGES)
    # [RANGES, rows]; loaded at once, since everything waits for them
    real = (index < limits.ranges)[:, None] & (rows < num_queries)[None, :]
    low, high = limits_of(limits, index[:, None], batch, rows[None, :], real, slots)
    some = high > low
    last = tl.max(tl.where(some, high, 0), 1)
    first = tl.minimum(tl.min(tl.where(some, low, LAST), 1), last)
    return first, last, tl.cumsum(tl.cdiv(last - first, CLUSTERS), 0)


@triton.jit
def _clusters_of(tile, first, last, until, index, CLUSTERS: tl.constexpr):
    """The range of a tile, its clusters, and which of these belong to the range; none where there is no such tile."""
    here = tl.sum((tile >= until).to(tl.int32), 0)
    mine = index == here
    before = tl.sum(tl.where(mine, until - tl.cdiv(last - first, CLUSTERS), 0), 0)
    number = tl.sum(tl.where(mine, first, 0), 0) + (tile - before) * CLUSTERS + tl.arange(0, CLUSTERS)
    return here, number, number < tl.sum(tl.where(mine, last, 0), 0)


@triton.jit
def score_few_kernel(
    q, q_batch, q_head, q_row, q_dim, kept, limits, entries, room, kv_heads, num_queries, spread,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
    QUERIES: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """``entries``: int64 ``[B, G, N, room]``, of each cluster that a query may open its score, above its number, so
    that they compare as in the ranking; the lowest number there is for others. The ranges of all queries of a head
    follow one another there, in whole tiles; no two share a cluster. A program takes every ``num_programs``-th tile;
    ``QUERIES`` and ``RANGES`` are at least as many as there are."""
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
    first, last, until = _tiles_of(limits, batch, tl.arange(0, QUERIES), num_queries, kept.slots, CLUSTERS, RANGES)
    index = tl.arange(0, RANGES)
    programs = tl.num_programs(0)
    from_tile = tl.program_id(0)
    here, number, inside = _clusters_of(from_tile, first, last, until, index, CLUSTERS)
    size = tl.load(kept.size + of_head + number, mask=inside, other=0)
    for tile in range(from_tile, tl.max(until, 0), programs):
        least, most = limits_of(limits, here, batch, rows, real, kept.slots)
        # on its way while this tile is scored
        here, next_number, inside = _clusters_of(tile + programs, first, last, until, index, CLUSTERS)
        next_size = tl.load(kept.size + of_head + next_number, mask=inside, other=0)
        # [CLUSTERS, W]; an empty slot is not worth a row
        cells = (of_head + number)[:, None] * D + dims[None, :]
        some = (size > 0)[:, None] & (dims < D)[None, :]
        high, low = parts_of(tl.load(kept.centroids + cells, mask=some, other=0.0))
        variances = None
        if kept.variances is not None:
            variances = tl.trans(tl.load(kept.variances + cells, mask=some, other=0.0).to(tl.bfloat16))
        # [ROWS, CLUSTERS]
        scores = score_tile(x, rest, squares, tl.trans(high), tl.trans(low), variances, CLUSTERS, PARTS) + 0.0  # no -0
        allowed = (number[None, :] >= least[:, None]) & (number[None, :] < most[:, None]) & (size > 0)[None, :]
        allowed = allowed & (scores > -float("inf"))  # and no NaN
        entry = (ordered_as_int(scores).to(tl.int64) << 32) | (number ^ 0x7FFFFFFF)[None, :].to(tl.int64)
        place = tile * CLUSTERS + tl.arange(0, CLUSTERS)
        tl.store(
            out + place[None, :],
            tl.where(allowed, entry, LOWEST_ENTRY),
            mask=real[:, None] & (place < room)[None, :],
        )
        number, size = next_number, next_size


@triton.jit
def best_few_kernel(
    limits, entries, best, room, width, slots, num_queries,
    QUERIES: tl.constexpr, RANGES: tl.constexpr, CLUSTERS: tl.constexpr, SHARE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """``best``: int64 ``[B, G, N, width]``, the ``MOST`` highest ``entries`` of every ``SHARE`` of them, from the
    highest down. Share ``program_id(0) // N`` of query ``program_id(0) % N``, head ``program_id(1)``; shares without
    clusters write nothing."""
    row = tl.program_id(0) % num_queries
    first = tl.program_id(0) // num_queries * SHARE
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    _, _, until = _tiles_of(limits, batch, tl.arange(0, QUERIES), num_queries, slots, CLUSTERS, RANGES)
    count = tl.minimum(tl.max(until, 0) * CLUSTERS, room)
    line = (batch * tl.num_programs(1) + head) * num_queries + row
    if first < count:
        entry = first + tl.arange(0, SHARE)
        found = tl.topk(tl.load(entries + line * room + entry, mask=entry < count, other=LOWEST_ENTRY), MOST)
        tl.store(best + line * width + first // SHARE * MOST + tl.arange(0, MOST), found)


@triton.jit
def open_few_kernel(
    kept, limits, best, opened, room, width, kv_heads, num_queries,
    QUERIES: tl.constexpr, RANGES: tl.constexpr, CLUSTERS: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """``opened``: int32 ``[B, G, N, most]``, of query ``program_id(0)``, head ``program_id(1)``, from what
    `best_few_kernel` left, ``CHUNK`` entries at a time."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    _, _, until = _tiles_of(limits, batch, tl.arange(0, QUERIES), num_queries, kept.slots, CLUSTERS, RANGES)
    count = tl.cdiv(tl.minimum(tl.max(until, 0) * CLUSTERS, room), SHARE) * MOST
    of_head = (batch * kv_heads + head // (heads // kv_heads)) * kept.slots
    line = (batch * heads + head) * num_queries + row
    chunk = tl.arange(0, CHUNK)
    highest = tl.topk(tl.load(best + line * width + chunk, mask=chunk < count, other=LOWEST_ENTRY), MOST)
    for first in range(CHUNK, count, CHUNK):
        entry = first + chunk
        more = tl.topk(tl.load(best + line * width + entry, mask=entry < count, other=LOWEST_ENTRY), MOST)
        highest = tl.topk(tl.reshape(tl.join(highest, more), (2 * MOST,)), MOST)
    slot = tl.arange(0, MOST)
    some = (highest > LOWEST_ENTRY) & (slot < opened.most)
    numbers = (highest & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    size = tl.load(kept.size + of_head + numbers, mask=some, other=0)
    start = tl.load(kept.start + of_head + numbers, mask=some, other=0)
    # the first that does not fit ends the row
    fits = some & (tl.cumsum(size.to(tl.int64), 0) <= opened.budget)
    numbers = tl.where(fits, numbers, -1)
    starts = tl.where(fits, start, 0)
    ends = tl.where(fits, start + size, 0)
    out = line * opened.most + slot
    tl.store(opened.numbers + out, numbers, mask=slot < opened.most)
    tl.store(opened.start + out, starts, mask=slot < opened.most)
    tl.store(opened.end + out, ends, mask=slot < opened.most)
