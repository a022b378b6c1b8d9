"""The ranking kernel: scores of a tile of clusters, of which those that can still be opened go to a small buffer.

Scores are compared as int32 that rise as float32 do. A row needs no cluster below its *bound*, if clusters at or above
the bound already have as many keys as the budget, or are as many as may be opened. Bounds come from buckets: every
column of the tiles keeps the largest score that it has seen, and the size of that cluster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import INTERPRETED, PTX, dot

LOWEST = tl.constexpr(-(2**31))
LOWEST_ENTRY = tl.constexpr(-(2**63))
LAST = tl.constexpr(2**31 - 1)
_SIZE_BITS = tl.constexpr(255)  # of a bucket, the low ones: the size of its cluster, at most 255
_ONE = tl.constexpr(1 << 20)  # added to a size, counts the buckets in a sum of sizes
_STEPS = tl.constexpr(6)


class Table(NamedTuple):
    """Clusters of each KV head, contiguous: bfloat16 ``[B * Hkv * S + CLUSTERS, W]``, the parts ``high`` and ``low`` of
    centroids, and variances (``None``: they do not count); ``start`` and ``size`` int32 ``[B, Hkv, S]``; and S."""

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
    """Of each program: ``entries`` int64 ``[ROWS, CAPACITY]``, clusters that may be opened; ``counts`` int32
    ``[ROWS]``, how many there are; and ``bounds`` int32 ``[ROWS]``."""

    entries: Any
    counts: Any
    bounds: Any


@triton.jit
def parts_of(x):
    """bfloat16 tensors whose sum is float32 ``x``, up to a 2**-17th of it."""
    high = x.to(tl.bfloat16)
    whole = high.to(tl.float32)
    return high, tl.where(tl.abs(whole) < float("inf"), x - whole, 0.0).to(tl.bfloat16)


@triton.jit
def split_kernel(
    centroids, variances, high, low, rounded, rows, all_rows, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr
):
    """float32 ``[rows, D]`` → bfloat16 ``[all_rows, W]``, zeros behind: both parts of centroids, ``rounded``
    variances."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, W)[None, :]
    some = (row < rows) & (dims < D)
    out = row * W + dims
    first, rest = parts_of(tl.load(centroids + row * D + dims, mask=some, other=0.0))
    tl.store(high + out, first, mask=row < all_rows)
    tl.store(low + out, rest, mask=row < all_rows)
    if variances is not None:
        some_variances = tl.load(variances + row * D + dims, mask=some, other=0.0)
        tl.store(rounded + out, some_variances.to(tl.bfloat16), mask=row < all_rows)


@triton.jit
def limits_of(limits, index, batch, row, real, slots):
    at = batch * limits.batch + row * limits.row + index * limits.range
    low = tl.maximum(tl.load(limits.low + at, mask=real, other=0), 0)
    high = tl.minimum(tl.load(limits.high + at, mask=real, other=0), slots)
    return low, high


@triton.jit
def ordered_as_int(scores):
    """int32 that compare as float32 ``scores`` do, where none is -0."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _raised(bound, buckets, budget, most):
    """A higher ``bound [ROWS]`` for what ``buckets [ROWS, CLUSTERS]`` hold, by bisection; any that is enough is
    right."""
    filled = buckets > LOWEST + _SIZE_BITS
    every = tl.sum(tl.where(filled, (buckets & _SIZE_BITS) + _ONE, 0), 1)
    enough = ((every & (_ONE - 1)) >= budget) | ((every >> 20) >= most)
    lowest = tl.min(tl.where(filled, buckets, LAST), 1)
    low = _score_of(tl.where(enough, tl.maximum(lowest & ~_SIZE_BITS, bound), 0))
    high = tl.minimum(_score_of(tl.where(enough, tl.max(buckets, 1), 0)), 3e38)
    for _ in range(_STEPS):
        middle = 0.5 * low + 0.5 * high
        at_least = ordered_as_int(middle) & ~_SIZE_BITS
        here = tl.sum(tl.where(buckets >= at_least[:, None], (buckets & _SIZE_BITS) + _ONE, 0), 1)
        reached = ((here & (_ONE - 1)) >= budget) | ((here >> 20) >= most)
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return tl.where(enough, tl.maximum(bound, ordered_as_int(low) & ~_SIZE_BITS), bound)


@triton.jit
def score_tile(x, rest, squares, high, low, variances, CLUSTERS: tl.constexpr, PARTS: tl.constexpr):
    """``[ROWS, CLUSTERS]`` of queries ``x + rest [ROWS, W]`` and centroids ``high + low [W, CLUSTERS]``. The same bits
    for the same query and cluster, wherever they stand in a tile: decoding opens what prefill opens."""
    scores = dot(x, low, tl.zeros((x.shape[0], CLUSTERS), tl.float32), "ieee")
    if PARTS == 2:
        more = dot(rest, high, tl.zeros((x.shape[0], CLUSTERS), tl.float32), "ieee")
        scores += tl.where(more == more, more, 0.0)  # 0 times infinity; the product below decides
    if variances is not None:
        scores = dot(squares, variances, scores, "ieee")
    return dot(x, high, scores, "ieee")


@triton.jit
def _scores(
    x, rest, squares, table, first,
    W: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, CLUSTERS]`` of queries ``x + rest [ROWS, W]`` and the clusters in row ``first`` of the table and on."""
    at = (first + tl.arange(0, CLUSTERS)[:, None]) * W + tl.arange(0, W)[None, :]
    # all on their way before the first is used
    low = tl.trans(tl.load(table.low + at))
    high = tl.trans(tl.load(table.high + at))
    variances = None
    if table.variances is not None:
        variances = tl.trans(tl.load(table.variances + at))
    return score_tile(x, rest, squares, high, low, variances, CLUSTERS, PARTS)


@triton.jit
def _places(passes, first, CLUSTERS: tl.constexpr):
    """Where each entry of a row that passes goes, int32 ``[ROWS, CLUSTERS]``: one place after the other from ``first
    [ROWS]`` on, all less than 2**20. A product with a triangle of ones moves nothing between lanes."""
    number = tl.arange(0, CLUSTERS)
    earlier = (number[:, None] < number[None, :]).to(tl.float32).to(tl.bfloat16)
    flags = passes.to(tl.float32).to(tl.bfloat16)
    before = dot(flags, earlier, tl.zeros((passes.shape[0], CLUSTERS), tl.float32), "ieee")
    # of the float32 2**20 + n, all bits of n are at a fixed place
    base = ((first << 3) + 0x49800000).to(tl.float32, bitcast=True)
    return ((before + base[:, None]).to(tl.int32, bitcast=True) >> 3) & 0xFFFFF


@triton.jit
def _store_in_place(base, places, values, mask):
    """int64 ``values`` to ``base[places]``, from the lanes that hold them; ``places`` int32, not negative. `tl.store`
    would first bring neighbors in memory together, through shared memory and 16 barriers a tile."""
    if PTX:
        tl.inline_asm_elementwise(
            """{
                .reg .pred wanted;
                .reg .b64 address;
                setp.ne.b32 wanted, $4, 0;
                mad.wide.u32 address, $2, 8, $1;
                @wanted st.global.b64 [address], $3;
                mov.b32 $0, 0;
            }""",
            "=r,l,r,l,r",
            [base, places, values, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(base + places, values, mask=mask)


@triton.jit
def _kept(entries, count, least, ROWS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """Drop the entries below ``least [ROWS]``; returns how many stay."""
    row = tl.arange(0, ROWS) * CAPACITY
    kept = tl.zeros((ROWS,), tl.int32)
    tl.debug_barrier()
    for first in range(0, tl.max(count, 0), CHUNK):
        slot = first + tl.arange(0, CHUNK)[None, :]
        entry = tl.load(entries + row[:, None] + slot, mask=slot < count[:, None], other=LOWEST_ENTRY)
        stays = (slot < count[:, None]) & (entry >= least[:, None])
        to = _places(stays, row + kept, CHUNK)
        tl.debug_barrier()  # a place may be one that was just read
        tl.store(entries + to, entry, mask=stays)
        tl.debug_barrier()
        kept += tl.sum(stays.to(tl.int32), 1)
    return kept


@triton.jit
def _most_of(
    entries, count, least, most, KEPT: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """An entry, int64 ``[ROWS]``, that at least ``most`` and at most ``KEPT`` entries of a row are no smaller than;
    ``least`` where the row has no more than ``KEPT``. By bisection: no two entries of a row are equal."""
    row = tl.arange(0, ROWS)[:, None] * CAPACITY
    low = least
    high = tl.full((ROWS,), LOWEST_ENTRY, tl.int64)
    for first in range(0, tl.max(count, 0), CHUNK):
        slot = first + tl.arange(0, CHUNK)[None, :]
        entry = tl.load(entries + row + slot, mask=slot < count[:, None], other=LOWEST_ENTRY)
        high = tl.maximum(high, tl.max(entry, 1) + 1)
    many = count > KEPT
    while tl.max(many.to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.zeros((ROWS,), tl.int32)
        for first in range(0, tl.max(count, 0), CHUNK):
            slot = first + tl.arange(0, CHUNK)[None, :]
            entry = tl.load(entries + row + slot, mask=slot < count[:, None], other=LOWEST_ENTRY)
            above += tl.sum((entry >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(many & (above >= most), middle, low)
        high = tl.where(above >= most, high, middle)
        many = many & ((above < most) | (above > KEPT))
    return low


@triton.jit
def _compress(
    scratch, most, LIMIT: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Drop the entries below the bounds, and, where more than ``LIMIT`` are left in some row, all but the best ``KEPT``
    of each or fewer, but no fewer than ``most``.

    Counts and bounds come and go through memory: what the main loop holds stays in the layout of its products.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entries = scratch.entries + tl.program_id(0).to(tl.int64) * ROWS * CAPACITY
    tl.debug_barrier()
    count = tl.load(scratch.counts + row)
    least = tl.load(scratch.bounds + row).to(tl.int64) << 32
    count = _kept(entries, count, least, ROWS, CAPACITY, CHUNK)
    if tl.max(count, 0) > LIMIT:
        least = _most_of(entries, count, least, most, KEPT, ROWS, CAPACITY, CHUNK)
        count = _kept(entries, count, least, ROWS, CAPACITY, CHUNK)
    tl.debug_barrier()
    tl.store(scratch.counts + row, count)
    tl.store(scratch.bounds + row, (least >> 32).to(tl.int32))
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
def rank_kernel(
    q, q_batch, q_head, q_row, q_dim, table, limits, opened, scratch, blocks, heads, kv_heads, items, num_queries,
    spread,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, CAPACITY: tl.constexpr,
    KEPT: tl.constexpr, SORTED: tl.constexpr, PARTS: tl.constexpr, DISJOINT: tl.constexpr,
):  # fmt: skip
    """``opened``: int32 ``[B, G, N, most]``. A program takes every ``num_programs``-th of the ``items``, which are
    ``blocks`` of ``ROWS`` queries of each head of each batch element. ``DISJOINT``: no cluster is in two ranges."""
    rows = tl.arange(0, ROWS)
    slot = tl.arange(0, KEPT)[None, :]
    entries = scratch.entries + tl.program_id(0).to(tl.int64) * ROWS * CAPACITY
    counts = scratch.counts + tl.program_id(0).to(tl.int64) * ROWS
    bounds = scratch.bounds + tl.program_id(0).to(tl.int64) * ROWS
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        head = (item // blocks % heads).to(tl.int64)
        batch = (item // blocks // heads).to(tl.int64)
        of_head = (batch * kv_heads + head // (heads // kv_heads)) * table.slots
        sizes = table.size + of_head
        row = block * ROWS + rows
        real = row < num_queries
        dims = tl.arange(0, W)[None, :]
        at = q + (batch * q_batch + head * q_head) + row[:, None].to(tl.int64) * q_row + dims * q_dim
        x = tl.load(at, mask=real[:, None] & (dims < D), other=0.0)
        wide = x.to(tl.float32)
        rest = x
        if PARTS == 2:
            x, rest = parts_of(wide)
        squares = (spread * wide * wide).to(tl.bfloat16)
        bound = tl.full((ROWS,), LOWEST + 1, tl.int32)
        buckets = tl.full((ROWS, CLUSTERS), LOWEST, tl.int32)
        count = tl.zeros((ROWS,), tl.int32)
        most_entries = 0  # no row has more; a sum, since a maximum over rows takes a barrier
        tiles = 0
        for index in range(limits.ranges):
            low, high = limits_of(limits, index, batch, row, real, table.slots)
            some = high > low
            first = tl.min(tl.where(some, low, LAST), 0)
            last = tl.max(tl.where(some, high, 0), 0)
            alike = (tl.max(low, 0) <= first) & (tl.min(high, 0) >= last)  # every row sees first to last
            repeats = 0
            if not DISJOINT:
                for earlier in range(index):
                    begin, end = limits_of(limits, earlier, batch, row, real, table.slots)
                    repeats += tl.sum((tl.maximum(begin, low) < tl.minimum(end, high)).to(tl.int32), 0)
            for start in range(first, last, CLUSTERS):
                number = start + tl.arange(0, CLUSTERS)
                size = tl.load(sizes + number, mask=number < last, other=0)
                # [ROWS, CLUSTERS]
                scores = _scores(x, rest, squares, table, of_head + start, W, CLUSTERS, PARTS)
                scores += tl.where(size > 0, 0.0, -float("inf"))[None, :]  # and no -0
                if not alike:
                    low, high = limits_of(limits, index, batch, row, real, table.slots)
                    allowed = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])
                    scores = tl.where(allowed, scores, -float("inf"))
                if repeats > 0:  # what an earlier range holds has been seen
                    for earlier in range(index):
                        begin, end = limits_of(limits, earlier, batch, row, real, table.slots)
                        seen = (number[None, :] >= begin[:, None]) & (number[None, :] < end[:, None])
                        scores = tl.where(seen, -float("inf"), scores)
                ordered = tl.where(scores > -float("inf"), ordered_as_int(scores), LOWEST)  # and no NaN
                buckets = tl.maximum(buckets, (ordered & ~_SIZE_BITS) | tl.minimum(size, _SIZE_BITS)[None, :])
                tiles += 1
                if (tiles & (tiles - 1)) == 0:
                    bound = _raised(bound, buckets, opened.budget, opened.most)
                passes = ordered >= bound[:, None]
                to = _places(passes, rows * CAPACITY + count, CLUSTERS)
                entry = (ordered.to(tl.int64) << 32) | (number ^ 0x7FFFFFFF)[None, :].to(tl.int64)
                _store_in_place(entries, to, entry, passes)
                count += tl.sum(passes.to(tl.int32), 1)
                most_entries += CLUSTERS
                if most_entries > CAPACITY - CLUSTERS:
                    most_entries = tl.max(count, 0)
                    if most_entries > CAPACITY - CLUSTERS:
                        tl.store(counts + rows, count)
                        tl.store(bounds + rows, _raised(bound, buckets, opened.budget, opened.most))
                        _compress(scratch, opened.most, CAPACITY - CLUSTERS, KEPT, ROWS, CAPACITY, CLUSTERS)
                        count = tl.load(counts + rows)
                        bound = tl.load(bounds + rows)
                        most_entries = tl.max(count, 0)
        tl.store(counts + rows, count)
        tl.store(bounds + rows, _raised(bound, buckets, opened.budget, opened.most))
        _compress(scratch, opened.most, KEPT, KEPT, ROWS, CAPACITY, CLUSTERS)
        for part in range(0, ROWS, SORTED):
            some = part + tl.arange(0, SORTED)[:, None]
            here = entries + some * CAPACITY + slot
            best = tl.load(here, mask=slot < tl.load(counts + some), other=LOWEST_ENTRY)
            best = _descending(best, KEPT)
            number = (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
            found = best > LOWEST_ENTRY
            size = tl.load(sizes + number, mask=found, other=0)
            # the first that does not fit ends the row
            fits = found & (tl.cumsum(size.to(tl.int64), 1) <= opened.budget) & (slot < opened.most)
            start = tl.load(table.start + of_head + number, mask=fits, other=0)
            query = block * ROWS + some
            out = ((batch * heads + head) * num_queries + query) * opened.most + slot
            there = (query < num_queries) & (slot < opened.most)
            tl.store(opened.numbers + out, tl.where(fits, number, -1), mask=there)
            tl.store(opened.start + out, start, mask=there)
            tl.store(opened.end + out, tl.where(fits, start + size, 0), mask=there)
        tl.debug_barrier()  # the next item writes over the entries
