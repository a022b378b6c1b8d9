"""Numba kernels that rank clusters: queries by strips of centroids, then the best, one after the other.

A strip holds the centroids of `STRIP` clusters that are not empty, transposed. The largest score of each strip is
kept, so that finding the next best of all clusters looks at one number per strip, and at one strip. Few are taken:
the budget ends it sooner than a sort would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import types

from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_simd import fma, load, place_of_largest, splat, store

intrinsic: Any = extending.intrinsic  # typed as if the caller passed the typing context

LANES = 16
STRIP = 64
"""Clusters of a strip; with a head dim of 64, it takes 16 KiB of the nearest cache."""
ROWS = 16
"""Queries that a strip serves while it is there."""
TOGETHER = 4
"""Queries scored at once: with two vectors of centroids, eight sums, which fit the registers and do not wait."""
_NONE = np.int32(-(2**31))
"""The rank of what cannot be opened; below that of every score."""


class Scratch(NamedTuple):
    """Memory of one task.

    Attributes:
        sums: float32 ``[TOGETHER * STRIP]``, scores of some queries.
        ranks: int32 ``[ROWS, strips * STRIP]``, scores as integers of the same order.
        largest, places: int32 ``[ROWS, strips up to LANES]``, the largest rank of each strip, and where in it.
        left, found: int64 ``[ROWS]``, keys that a query may still open, -1 = it ended; clusters that it opened.
    """

    sums: Any
    ranks: Any
    largest: Any
    places: Any
    left: Any
    found: Any


@bare_kernel
def build_strips(centroids: Any, size: Any, strips: Any, numbers: Any, before: Any) -> None:
    """The clusters that are not empty, in ascending order, as strips.

    Args:
        centroids: float32 ``[S, D]``. size: int32 ``[S]``.
        strips: out, float32, ``[strips, D, STRIP]``. numbers: out, int32 ``[S]``, the slot of each of them.
        before: out, int32 ``[S + 1]``, how many of them have a lower number.
    """
    dim, found = centroids.shape[1], 0
    strips[:] = 0
    for c in range(size.shape[0]):
        before[c] = found
        if size[c] > 0:
            base = found // STRIP * dim * STRIP + found % STRIP
            for d in range(dim):
                strips[base + d * STRIP] = centroids[c, d]
            numbers[found] = c
            found += 1
    before[size.shape[0]] = found


@bare_kernel
def rank_block(
    q: Any, strips: Any, numbers: Any, before: Any, size: Any, low: Any, high: Any, first: int, last: int, budget: int,
    scratch: Any, opened: Any,
) -> None:  # fmt: skip
    """The clusters that the queries from ``first`` to before ``last`` open.

    Args:
        q: float32 ``[N, D]``. strips, numbers, before: of `build_strips`. size: int32 ``[S]``.
        low, high: int32 ``[N, R]``. opened: out, int32 ``[N, most]``.
    """
    rows, dim = q.reshape(q.size), q.shape[1]
    for row in range(first, last, ROWS):
        count = min(ROWS, last - row)
        begin, end = size.shape[0], 0  # of all queries in the block
        for n in range(row, row + count):
            for r in range(low.shape[1]):
                begin, end = min(begin, _index(before, low[n, r])), max(end, _index(before, high[n, r]))
        scratch.largest[:] = _NONE
        for strip in range(begin // STRIP, (end + STRIP - 1) // STRIP):
            base = strip * STRIP
            for i in range(0, count, TOGETHER):
                some = min(TOGETHER, count - i)
                columns = 0
                for n in range(row + i, row + i + some):
                    _, upper, _ = _inside(before, low[n], high[n], base)
                    columns = max(columns, upper)
                for column in range(0, min(columns, STRIP), 2 * LANES):
                    _score(rows, row + i, some - 1, dim, strips, base * dim + column, scratch.sums, column)
                for t in range(some):
                    lower, upper, several = _inside(before, low[row + i + t], high[row + i + t], base)
                    if lower < upper:
                        for j in range(0, STRIP, LANES):
                            _take_ranks(
                                scratch.sums, t * STRIP + j, scratch.ranks[i + t], base + j, j, lower, upper
                            )  # fmt: skip
                        if several:
                            _drop_between(before, low[row + i + t], high[row + i + t], base, scratch.ranks[i + t])
                        _find_largest(scratch, i + t, strip)
        scratch.left[:] = budget
        scratch.found[:] = 0
        opened[row : row + count] = -1
        going = count
        while going > 0:  # in turns: a query has to wait for its last cluster, but not for those of the others
            for i in range(count):
                if scratch.left[i] >= 0:
                    going -= _open_next(scratch, i, numbers, size, opened[row + i])


@device_function
def _index(before: Any, limit: int) -> int:
    """Where the slots from ``limit`` on begin among those that are not empty."""
    return before[min(max(limit, 0), before.shape[0] - 1)]


@device_function
def _inside(before: Any, low: Any, high: Any, base: int) -> tuple[int, int, bool]:
    """First and one past the last column of the strip at ``base`` in any of the ranges ``low, high [R]``, and
    whether there are several such ranges; ``0, 0`` if none."""
    first, last, ranges = STRIP, 0, 0
    for r in range(low.shape[0]):
        lower = max(_index(before, low[r]) - base, 0)
        upper = min(_index(before, high[r]) - base, STRIP)
        if lower < upper:
            first, last, ranges = min(first, lower), max(last, upper), ranges + 1
    return (first, last, ranges > 1) if ranges else (0, 0, False)


@device_function
def _drop_between(before: Any, low: Any, high: Any, base: int, ranks: Any) -> None:
    """What lies in none of the ranges cannot be opened."""
    for column in range(STRIP):
        inside = False
        for r in range(low.shape[0]):
            lower, upper = _index(before, low[r]) - base, _index(before, high[r]) - base
            inside |= lower <= column < upper
        if not inside:
            ranks[base + column] = _NONE


@device_function
def _score(rows: Any, n: int, last: int, dim: int, strips: Any, at: int, sums: Any, to: int) -> None:
    """Queries n to ``n + last``, at most four, by two vectors of columns of a strip.

    A query is computed in the same way, whatever others it is computed with.
    """
    low0 = high0 = low1 = high1 = low2 = high2 = low3 = high3 = splat(sums, np.float32(0))
    x0, x1, x2, x3 = n * dim, (n + min(1, last)) * dim, (n + min(2, last)) * dim, (n + min(3, last)) * dim
    for d in range(dim):
        low, high = load(strips, at + d * STRIP), load(strips, at + d * STRIP + LANES)
        number = splat(sums, rows[x0 + d])
        low0, high0 = fma(number, low, low0), fma(number, high, high0)
        number = splat(sums, rows[x1 + d])
        low1, high1 = fma(number, low, low1), fma(number, high, high1)
        number = splat(sums, rows[x2 + d])
        low2, high2 = fma(number, low, low2), fma(number, high, high2)
        number = splat(sums, rows[x3 + d])
        low3, high3 = fma(number, low, low3), fma(number, high, high3)
    store(sums, to, low0)
    store(sums, to + LANES, high0)
    store(sums, to + STRIP, low1)
    store(sums, to + STRIP + LANES, high1)
    store(sums, to + 2 * STRIP, low2)
    store(sums, to + 2 * STRIP + LANES, high2)
    store(sums, to + 3 * STRIP, low3)
    store(sums, to + 3 * STRIP + LANES, high3)


@intrinsic
def _take_ranks(typingctx: Any, scores: Any, at: Any, ranks: Any, to: Any, first: Any, lower: Any, upper: Any) -> Any:
    """``LANES`` scores as integers of the same order, -0 like 0; `_NONE` where ``first + lane`` is out of bounds.

    In a loop, Numba would widen int32 to int64.
    """
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        number = ir.VectorType(i32, LANES)

        def place(i: int, kind: ir.VectorType) -> Any:
            data = context.make_array(signature.args[i])(context, builder, value=args[i]).data
            return builder.bitcast(builder.gep(data, [args[i + 1]]), kind.as_pointer())

        def constant(value: int) -> ir.Constant:
            return ir.Constant(number, [value] * LANES)

        def splat_bound(bound: Any) -> Any:
            one = builder.insert_element(constant(0), builder.trunc(bound, i32), ir.Constant(i64, 0))
            return builder.shuffle_vector(one, one, constant(0))

        score = builder.load(place(0, ir.VectorType(ir.FloatType(), LANES)), align=4)
        bits = builder.bitcast(score, number)
        none = constant(int(_NONE))
        rank = builder.select(builder.icmp_signed("<", bits, constant(0)), builder.sub(none, bits), bits)
        lane = builder.add(splat_bound(args[4]), ir.Constant(number, list(range(LANES))))
        inside = builder.icmp_signed(">=", lane, splat_bound(args[5]))
        inside = builder.and_(inside, builder.icmp_signed("<", lane, splat_bound(args[6])))
        lowest = ir.Constant(score.type, [float("-inf")] * LANES)
        valid = builder.and_(inside, builder.fcmp_ordered(">", score, lowest))
        builder.store(builder.select(valid, rank, none), place(2, number), align=4)
        return context.get_dummy_value()

    return types.void(scores, int64, ranks, int64, int64, int64, int64), codegen


@device_function
def _find_largest(scratch: Any, i: int, strip: int) -> None:
    place = place_of_largest(scratch.ranks[i], strip * STRIP, STRIP)
    scratch.places[i, strip] = place
    scratch.largest[i, strip] = scratch.ranks[i, strip * STRIP + place]


@device_function
def _open_next(scratch: Any, i: int, numbers: Any, size: Any, opened: Any) -> int:
    """Open one more cluster for query i, or end it; returns how many queries ended, 0 or 1."""
    strip = place_of_largest(scratch.largest[i], 0, scratch.largest.shape[1])
    place = strip * STRIP + scratch.places[i, strip]
    if scratch.largest[i, strip] == _NONE or size[numbers[place]] > scratch.left[i]:
        scratch.left[i] = -1
        return 1
    opened[scratch.found[i]] = numbers[place]
    scratch.left[i] -= size[numbers[place]]
    scratch.found[i] += 1
    if scratch.found[i] == opened.shape[0]:
        scratch.left[i] = -1
        return 1
    scratch.ranks[i, place] = _NONE
    _find_largest(scratch, i, strip)
    return 0
