"""The ranking kernel: scores of a chunk of clusters, then the few of them that can still be opened, chunk by chunk.

Scores are compared as int32 that rise as float32 do. A row needs no cluster below its *bound*, if clusters at or above
the bound already have as many keys as the budget, or are as many as may be opened. Bounds come from buckets: every
column of the tiles keeps the largest score that it has seen, and the size of that cluster. What reaches the bound is an
*entry*: an int64 that is larger for higher scores and, of equal ones, for lower numbers.

Products and choice are loops of their own, because only a loop without branches and inner loops has its loads issued
ahead of their use. The scores between them are written to memory, so few at a time that they stay in the L2 cache, and
in an order in which each thread finds its own: a row's clusters go to ``LISTS`` lists, and a thread owns a list. It
writes what it chooses to the end of its list, and nothing is exchanged between threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import INTERPRETED, dot

_LOWEST = tl.constexpr(-(2**31))
_LOWEST_FINITE = tl.constexpr(-(2**31) + 2**23)  # of the ordered scores; -inf is one less
_LOWEST_ENTRY = tl.constexpr(-(2**63))
_HIGHEST_ENTRY = tl.constexpr(2**63 - 1)
_LAST = tl.constexpr(2**31 - 1)
_SIZE_BITS = tl.constexpr(255)  # of a bucket, the low ones: the size of its cluster, at most 255
_ONE = tl.constexpr(1 << 20)  # added to a size, counts the buckets in a sum of sizes
_STEPS = tl.constexpr(9)


class Table(NamedTuple):
    """Clusters of each KV head, contiguous: bfloat16 ``[B * Hkv * S + CLUSTERS, W]``, the parts ``high`` and ``low`` of
    centroids, and variances (``None``: they do not count); ``size`` int32 ``[B * Hkv * S + CLUSTERS]``; ``start`` int32
    ``[B, Hkv, S]``; and S."""

    high: Any
    low: Any
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


class Opened(NamedTuple):
    """The fields of `OpenedClusters`; ``most`` clusters of a query, ``budget`` keys."""

    numbers: Any
    start: Any
    end: Any
    most: Any
    budget: Any


class Scratch(NamedTuple):
    """Of each program: ``scores`` int32 ``[CHUNK / LISTS / 4, LISTS, ROWS, 4]``, ordered; ``entries`` int64
    ``[ROWS, LISTS, CAPACITY]``, clusters that may be opened; ``counts`` int32 ``[LISTS, ROWS]``, how many there are;
    and ``bounds`` int32 ``[ROWS]``."""

    scores: Any
    entries: Any
    counts: Any
    bounds: Any


@triton.jit
def _parts(x):
    """bfloat16 tensors whose sum is float32 ``x``, up to a 2**-17th of it."""
    high = x.to(tl.bfloat16)
    whole = high.to(tl.float32)
    return high, tl.where(tl.abs(whole) < float("inf"), x - whole, 0.0).to(tl.bfloat16)


@triton.jit
def split_kernel(
    centroids, variances, sizes, high, low, rounded, padded, rows, all_rows,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32 ``[rows, D]`` → bfloat16 ``[all_rows, W]``, zeros behind: both parts of centroids, ``rounded``
    variances; int32 ``sizes [rows]`` → ``padded [all_rows]``."""
    rows_here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    size = tl.load(sizes + rows_here, mask=rows_here < rows, other=0)
    tl.store(padded + rows_here, size, mask=rows_here < all_rows)
    row = rows_here[:, None]
    dims = tl.arange(0, W)[None, :]
    some = (row < rows) & (dims < D)
    out = row * W + dims
    first, rest = _parts(tl.load(centroids + row * D + dims, mask=some, other=0.0))
    tl.store(high + out, first, mask=row < all_rows)
    tl.store(low + out, rest, mask=row < all_rows)
    if variances is not None:
        some_variances = tl.load(variances + row * D + dims, mask=some, other=0.0)
        tl.store(rounded + out, some_variances.to(tl.bfloat16), mask=row < all_rows)


@triton.jit
def _limits_of(limits, index, batch, row, real, slots):
    at = batch * limits.batch + row * limits.row + index * limits.range
    low = tl.maximum(tl.load(limits.low + at, mask=real, other=0), 0)
    high = tl.minimum(tl.load(limits.high + at, mask=real, other=0), slots)
    return low, high


@triton.jit
def _ordered(scores):
    """int32 that compare as float32 ``scores`` do, -0 as 0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _raised(bound, buckets, budget, most):
    """A higher ``bound [ROWS]`` for what ``buckets [ROWS, CLUSTERS]`` hold, by bisection; any that is enough is
    right."""
    filled = buckets >= _LOWEST_FINITE
    every = tl.sum(tl.where(filled, (buckets & _SIZE_BITS) + _ONE, 0), 1)
    enough = ((every & (_ONE - 1)) >= budget) | ((every >> 20) >= most)
    lowest = tl.min(tl.where(filled, buckets, _LAST), 1)
    low = _score_of(tl.where(enough, tl.maximum(lowest & ~_SIZE_BITS, bound), 0))
    high = tl.minimum(_score_of(tl.where(enough, tl.max(buckets, 1), 0)), 3e38)
    for _ in range(_STEPS):
        middle = 0.5 * low + 0.5 * high
        at_least = _ordered(middle) & ~_SIZE_BITS
        here = tl.sum(tl.where(buckets >= at_least[:, None], (buckets & _SIZE_BITS) + _ONE, 0), 1)
        reached = ((here & (_ONE - 1)) >= budget) | ((here >> 20) >= most)
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return tl.where(enough, tl.maximum(bound, _ordered(low) & ~_SIZE_BITS), bound)


@triton.jit
def _scores(
    x, rest, squares, table, first,
    W: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, CLUSTERS]`` of queries ``x + rest [ROWS, W]`` and the clusters in row ``first`` of the table and on."""
    inner = tl.arange(0, CLUSTERS)[:, None] * W + tl.arange(0, W)[None, :]
    # all on their way before the first is used
    low = tl.trans(tl.load(table.low + first * W + inner))
    high = tl.trans(tl.load(table.high + first * W + inner))
    if table.variances is not None:
        variances = tl.trans(tl.load(table.variances + first * W + inner))
    scores = dot(x, low, tl.zeros((x.shape[0], CLUSTERS), tl.float32), "ieee")
    if PARTS == 2:
        more = dot(rest, high, tl.zeros((x.shape[0], CLUSTERS), tl.float32), "ieee")
        scores += tl.where(more == more, more, 0.0)  # 0 times infinity; the product below decides
    if table.variances is not None:
        scores = dot(squares, variances, scores, "ieee")
    return dot(x, high, scores, "ieee")


@triton.jit
def _score_chunk(
    x, rest, squares, table, of_head, low, high, start, tiles, fresh, buckets, scores,
    ROWS: tl.constexpr, CLUSTERS: tl.constexpr, LISTS: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the ordered ``scores`` of ``tiles`` tiles of clusters from ``start`` on, the lowest number for those
    outside of ``low, high [ROWS]``. Returns the ``buckets [ROWS, CLUSTERS]``, which see them only if they are
    ``fresh``: with a cluster that counts twice, a bound would be too high."""
    each: tl.constexpr = CLUSTERS // LISTS
    column = tl.arange(0, CLUSTERS)
    of_four = column // 4 % (each // 4) * (LISTS * ROWS) + column // each * ROWS
    out = scores + (of_four[None, :] + tl.arange(0, ROWS)[:, None]) * 4 + (column % 4)[None, :]
    span = tl.maximum(high - low, 0).to(tl.uint32)
    score_bits = tl.where(fresh, -1 - _SIZE_BITS, 0)
    lowest = tl.where(fresh, 0, _LOWEST)
    for tile in range(tiles):
        first = start + tile * CLUSTERS
        number = first + column
        size = tl.load(table.size + (of_head + first) + column)
        # [ROWS, CLUSTERS]
        score = _scores(x, rest, squares, table, of_head + first, W, CLUSTERS, PARTS)
        # one comparison for both limits: what is too low, or no cluster, is a large number without sign
        number = tl.where(size > 0, number, -1)
        inside = (number[None, :] - low[:, None]).to(tl.uint32, bitcast=True) < span[:, None]
        score = tl.maximum(score, -float("inf"))  # NaN is not opened either
        ordered = tl.where(inside, _ordered(score), _LOWEST)
        size_bits = tl.minimum(size, _SIZE_BITS) | lowest
        buckets = tl.maximum(buckets, (ordered & score_bits) | size_bits[None, :])
        tl.store(out + tile * (ROWS * CLUSTERS), ordered)
    return buckets


@triton.jit
def _forget_seen(
    limits, index, batch, block, num_queries, slots, scores, start, tiles,
    ROWS: tl.constexpr, CLUSTERS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Give the lowest score to the clusters of a chunk that are also in a range after ``index``: these came first."""
    each: tl.constexpr = CLUSTERS // LISTS
    thread = tl.arange(0, LISTS * ROWS)
    row = block * ROWS + thread % ROWS
    four = tl.arange(0, 4)[None, :]
    for other in range(index + 1, limits.ranges):
        begin, end = _limits_of(limits, other, batch, row, row < num_queries, slots)
        for step in range(tiles * (each // 4)):
            number = start + step // (each // 4) * CLUSTERS + step % (each // 4) * 4
            number = (number + thread // ROWS * each)[:, None] + four
            seen = (number >= begin[:, None]) & (number < end[:, None])
            tl.store(scores + (step * (LISTS * ROWS) + thread)[:, None] * 4 + four, _LOWEST, mask=seen)


@triton.jit
def _append(score, bound, number, list_of_thread, count):
    """Add entries for the ``score [THREADS, 4]`` of four clusters from ``number [THREADS]`` on that reach the ``bound``
    to the lists; returns how many there are."""
    passes = score >= bound[:, None]
    place = count[:, None] + tl.cumsum(passes.to(tl.int32), 1) - 1
    low_bits = (number[:, None] + tl.arange(0, 4)[None, :]) ^ 0x7FFFFFFF
    tl.store(list_of_thread[:, None] + place, (score.to(tl.int64) << 32) | low_bits.to(tl.int64), mask=passes)
    return count + tl.sum(passes.to(tl.int32), 1)


@triton.jit
def _collect(
    scores, entries, counts, bounds, start, tiles,
    ROWS: tl.constexpr, CLUSTERS: tl.constexpr, LISTS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Add an entry for each score of the tiles of a chunk that reaches its row's bound."""
    each: tl.constexpr = CLUSTERS // LISTS
    step: tl.constexpr = 4 * LISTS * ROWS
    thread = tl.arange(0, LISTS * ROWS)
    bound = tl.load(bounds + thread % ROWS)
    count = tl.load(counts + thread)
    list_of_thread = entries + (thread % ROWS * LISTS + thread // ROWS) * CAPACITY
    own = scores + (thread[:, None] * 4 + tl.arange(0, 4)[None, :])
    number = start + thread // ROWS * each
    for tile in range(tiles):
        for part in tl.static_range(0, each, 16):
            at = own + (tile * (each // 4) + part // 4) * step
            # all on their way before the first is used
            first, second, third, fourth = (
                tl.load(at),
                tl.load(at + step),
                tl.load(at + 2 * step),
                tl.load(at + 3 * step),
            )
            count = _append(first, bound, number + (tile * CLUSTERS + part), list_of_thread, count)
            count = _append(second, bound, number + (tile * CLUSTERS + part + 4), list_of_thread, count)
            count = _append(third, bound, number + (tile * CLUSTERS + part + 8), list_of_thread, count)
            count = _append(fourth, bound, number + (tile * CLUSTERS + part + 12), list_of_thread, count)
    tl.store(counts + thread, count)


@triton.jit
def _longest(counts, ROWS: tl.constexpr, LISTS: tl.constexpr):
    """The largest number of entries of a row."""
    list_of_row = tl.arange(0, LISTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    return tl.max(tl.sum(tl.load(counts + list_of_row), 0), 0)


@triton.jit
def _compress(
    entries, counts, bounds, most, limit, ROWS: tl.constexpr, LISTS: tl.constexpr, CAPACITY: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Where a row has more than ``limit`` entries, drop those below its bound, and, where that is not enough, raise the
    bound by bisection, until ``limit`` are left, or ``most``. ``PART`` rows at a time."""
    slot = tl.arange(0, LISTS * CAPACITY)[None, :]
    for part in range(0, ROWS, PART):
        row = part + tl.arange(0, PART)
        here = entries + row[:, None] * (LISTS * CAPACITY) + slot
        there = slot % CAPACITY < tl.load(counts + (row[:, None] + slot // CAPACITY * ROWS))
        if tl.max(tl.sum(there.to(tl.int32), 1), 0) > limit:
            least = tl.load(bounds + row).to(tl.int64) << 32
            entry = tl.load(here, mask=there, other=_LOWEST_ENTRY)
            entry = tl.where(entry >= least[:, None], entry, _LOWEST_ENTRY)
            stays = tl.sum((entry > _LOWEST_ENTRY).to(tl.int32), 1)
            # at least `most` entries reach the lowest of `least`, fewer reach `above`
            above = tl.max(entry, 1) + 1
            lowest = tl.min(tl.where(entry > _LOWEST_ENTRY, entry, _HIGHEST_ENTRY), 1)
            least = tl.where(stays > limit, lowest, least)
            while tl.max(stays, 0) > limit:
                middle = (least & above) + ((least ^ above) >> 1)
                reached = tl.sum((entry >= middle[:, None]).to(tl.int32), 1)
                searched = stays > limit
                least = tl.where(searched & (reached >= most), middle, least)
                above = tl.where(searched & (reached < most), middle, above)
                stays = tl.where(searched & (reached >= most), reached, stays)
            kept = entry >= tl.maximum(least, _LOWEST_ENTRY + 1)[:, None]
            place = tl.cumsum(kept.to(tl.int32), 1) - 1
            tl.debug_barrier()  # a place may be one that was just read
            tl.store(entries + row[:, None] * (LISTS * CAPACITY) + place, entry, mask=kept)
            tl.store(bounds + row, (least >> 32).to(tl.int32))
            # all in the first list
            first = tl.arange(0, LISTS)[None, :] == 0
            to = counts + (row[:, None] + tl.arange(0, LISTS)[None, :] * ROWS)
            tl.store(to, tl.where(first, stays[:, None], 0))
    tl.debug_barrier()


@triton.jit
def _descending(x, SIZE: tl.constexpr):
    """``x [ROWS, SIZE]``, the largest of each row first."""
    if INTERPRETED:  # where `tl.sort` is slow: a bitonic network
        i = tl.arange(0, SIZE)[None, :] + tl.zeros(x.shape, tl.int32)
        for stage in tl.static_range(1, 11):
            if (1 << stage) <= SIZE:
                for bit in tl.static_range(stage - 1, -1, -1):
                    other = tl.gather(x, i ^ (1 << bit), 1)
                    upper = ((i >> bit) & 1) == ((i >> stage) & 1)
                    x = tl.where(upper, tl.maximum(x, other), tl.minimum(x, other))
    else:
        x = tl.sort(x, descending=True)
    return x


@triton.jit
def _write_best(
    entries, counts, table, of_head, opened, out, queries,
    ROWS: tl.constexpr, LISTS: tl.constexpr, CAPACITY: tl.constexpr, KEPT: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Sort the entries of each row, ``KEPT`` at most, and write those that fit the budget to rows ``out`` and on of
    ``opened``, of which ``queries`` are real. ``SORTED`` rows at a time."""
    slot = tl.arange(0, KEPT)[None, :]
    for part in range(0, ROWS, SORTED):
        row = part + tl.arange(0, SORTED)[:, None]
        # [SORTED, KEPT]
        at = row * (LISTS * CAPACITY) + slot
        filled = tl.load(counts + row)
        for following in tl.static_range(1, LISTS):
            at = tl.where(slot < filled, at, row * (LISTS * CAPACITY) + following * CAPACITY + slot - filled)
            filled += tl.load(counts + following * ROWS + row)
        best = tl.load(entries + at, mask=slot < filled, other=_LOWEST_ENTRY)
        best = _descending(best, KEPT)
        number = (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
        found = best > _LOWEST_ENTRY
        size = tl.load(table.size + of_head + number, mask=found, other=0)
        # the first that does not fit ends the row
        fits = found & (tl.cumsum(size.to(tl.int64), 1) <= opened.budget) & (slot < opened.most)
        start = tl.load(table.start + of_head + number, mask=fits, other=0)
        to = (out + row) * opened.most + slot
        there = (row < queries) & (slot < opened.most)
        tl.store(opened.numbers + to, tl.where(fits, number, -1), mask=there)
        tl.store(opened.start + to, start, mask=there)
        tl.store(opened.end + to, tl.where(fits, start + size, 0), mask=there)


@triton.jit
def rank_kernel(
    q, q_batch, q_head, q_row, q_dim, table, limits, opened, scratch, blocks, heads, kv_heads, items, num_queries,
    spread,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, CHUNK: tl.constexpr,
    LISTS: tl.constexpr, CAPACITY: tl.constexpr, KEPT: tl.constexpr, SORTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``q [B, G, N, D]`` → ``opened``, int32 ``[B, G, N, most]``. A program takes every ``num_programs``-th of the
    ``items``, which are ``blocks`` of ``ROWS`` queries of each head of each batch element."""
    rows = tl.arange(0, ROWS)
    threads = tl.arange(0, LISTS * ROWS)
    dims = tl.arange(0, W)[None, :]
    program = tl.program_id(0).to(tl.int64) * ROWS
    scores = scratch.scores + program * CHUNK
    entries = scratch.entries + program * (LISTS * CAPACITY)
    counts = scratch.counts + program * LISTS
    bounds = scratch.bounds + program
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        head = (item // blocks % heads).to(tl.int64)
        batch = (item // blocks // heads).to(tl.int64)
        of_head = (batch * kv_heads + head // (heads // kv_heads)) * table.slots
        row = block * ROWS + rows
        real = row < num_queries
        at = q + (batch * q_batch + head * q_head) + row[:, None].to(tl.int64) * q_row + dims * q_dim
        x = tl.load(at, mask=real[:, None] & (dims < D), other=0.0)
        wide = x.to(tl.float32)
        rest = x
        if PARTS == 2:
            x, rest = _parts(wide)
        squares = (spread * wide * wide).to(tl.bfloat16)
        buckets = tl.full((ROWS, CLUSTERS), _LOWEST, tl.int32)
        tl.store(counts + threads, tl.zeros((LISTS * ROWS,), tl.int32))
        tl.store(bounds + rows, tl.full((ROWS,), _LOWEST_FINITE, tl.int32))
        tl.debug_barrier()
        # the last range first: coarse clusters fill a budget with few, which gives a high bound for all the others
        for step in range(limits.ranges):
            index = limits.ranges - 1 - step
            low, high = _limits_of(limits, index, batch, row, real, table.slots)
            some = high > low
            begin = tl.min(tl.where(some, low, _LAST), 0)
            last = tl.max(tl.where(some, high, 0), 0)
            repeats = 0
            for other in range(index + 1, limits.ranges):
                other_low, other_high = _limits_of(limits, other, batch, row, real, table.slots)
                repeats += tl.sum((tl.maximum(other_low, low) < tl.minimum(other_high, high)).to(tl.int32), 0)
            for start in range(begin, last, CHUNK):
                tiles = tl.cdiv(tl.minimum(last - start, CHUNK), CLUSTERS)
                buckets = _score_chunk(
                    x, rest, squares, table, of_head, low, high, start, tiles, repeats == 0, buckets, scores,
                    ROWS, CLUSTERS, LISTS, W, PARTS,
                )  # fmt: skip
                bound = _raised(tl.load(bounds + rows), buckets, opened.budget, opened.most)
                tl.debug_barrier()
                tl.store(bounds + rows, bound)
                if repeats > 0:
                    _forget_seen(
                        limits, index, batch, block, num_queries, table.slots, scores, start, tiles,
                        ROWS, CLUSTERS, LISTS,
                    )  # fmt: skip
                tl.debug_barrier()
                _collect(scores, entries, counts, bounds, start, tiles, ROWS, CLUSTERS, LISTS, CAPACITY)
                tl.debug_barrier()  # the next chunk writes over the scores
                if _longest(counts, ROWS, LISTS) > CAPACITY - CHUNK // LISTS:
                    _compress(entries, counts, bounds, opened.most, KEPT, ROWS, LISTS, CAPACITY, LISTS * ROWS // 32)
        if _longest(counts, ROWS, LISTS) > KEPT:
            _compress(entries, counts, bounds, opened.most, KEPT, ROWS, LISTS, CAPACITY, LISTS * ROWS // 32)
        out = (batch * heads + head) * num_queries + block * ROWS
        _write_best(
            entries, counts, table, of_head, opened, out, num_queries - block * ROWS, ROWS, LISTS, CAPACITY, KEPT,
            SORTED,
        )  # fmt: skip
        tl.debug_barrier()  # the next item writes over the entries
