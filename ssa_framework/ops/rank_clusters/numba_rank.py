"""Numba kernels that rank clusters: clusters by tiles of queries, then the best, one after the other.

A lane of a vector is a query. A tile of them is transposed once, with the squares of its numbers where the variances
count, and meets the clusters that any of its queries may open, some at a time. The largest score of each group of
clusters is kept for each query, so that finding the next best looks at one number per group, for all queries at once,
and at one group. Few are taken: the budget ends it sooner than a sort would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_runtime import bare_kernel, device_function, inlined_function
from ssa_framework.ops.numba_tile_products import TILE, TILE_ROWS, drop_largest, largest_line, rows_by_tile
from ssa_framework.ops.numba_vectors import copy_numbers, transpose_tile

LANES = 16
GROUP = TILE_ROWS
"""Clusters of a group."""


class Scratch(NamedTuple):
    """Memory of one task: a tile of `TILE` queries. W is ``width``, the head dim and zeros up to a multiple of `LANES`.

    Attributes:
        queries: float32 ``[TILE, W]``. row: int32 ``[TILE]``, its rows.
        tile: float32 ``[W or 2 W, TILE]``, the queries transposed, and their scaled squares.
        low, high: int32 ``[R, TILE]``, the ranges of each query, counted among the clusters that are not empty.
        reach: int32 ``[R, 4]``, of each range: where it begins and ends for some query, and for all.
        inside: int32 ``[TILE]``, whether a query may open a cluster.
        scores: float32 ``[groups, GROUP, TILE]``. largest: float32 ``[groups, TILE]``, of those of each group.
        group: int32 ``[groups]``, which they are; only those that some query may look at are there.
        best, where: float32 and int32 ``[TILE]``, the largest of ``largest`` and which group that is.
        left, found: int64 ``[TILE]``, keys that a query may still open, -1 = it ended; clusters that it opened.
    """

    queries: Any
    row: Any
    tile: Any
    low: Any
    high: Any
    reach: Any
    inside: Any
    scores: Any
    largest: Any
    group: Any
    best: Any
    where: Any
    left: Any
    found: Any
    width: int


@bare_kernel
def build_rows(
    centroids: Any, variances: Any, parts: int, size: Any, width: int, rows: Any, numbers: Any, before: Any
) -> None:
    """The clusters that are not empty, in ascending order, and zeros up to a whole group.

    Args:
        centroids, variances: float32 ``[S, D]``. parts: 1 = no variances. size: int32 ``[S]``.
        rows: out, float32 ``[S up to GROUP, parts, width]``. numbers: out, int32 ``[S]``, the slot of each of them.
        before: out, int32 ``[S + 1]``, how many of them have a lower number.
    """
    dim, found = centroids.shape[1], 0
    means, squares = centroids.reshape(centroids.size), variances.reshape(variances.size)
    for c in range(size.shape[0]):
        before[c] = found
        if size[c] > 0:
            for part in range(parts):
                to = (found * parts + part) * width
                copy_numbers(squares if part else means, c * dim, rows, to, dim)
                rows[to + dim : to + width] = 0
            numbers[found] = c
            found += 1
    before[size.shape[0]] = found
    rows[found * parts * width : (found + GROUP - 1) // GROUP * GROUP * parts * width] = 0


@bare_kernel
def rank_block(
    q: Any, rows: Any, numbers: Any, before: Any, start: Any, size: Any, low: Any, high: Any, first: int, last: int,
    budget: int, spread: Any, scratch: Any, opened: Any, begins: Any, ends: Any,
) -> None:  # fmt: skip
    """The clusters that the queries from ``first`` to before ``last`` open.

    Args:
        q: float32 ``[N, D]``. rows, numbers, before: of `build_rows`. start, size: int32 ``[S]``.
        low, high: int32 ``[N, R]``. spread: float32. opened, begins, ends: out, int32 ``[N, most]``.
    """
    for row in range(first, last, TILE):
        count = min(TILE, last - row)
        _load_queries(q, row, count, spread, scratch)
        _load_ranges(before, low, high, row, count, scratch)
        groups = _score(rows, scratch)
        opened[row : row + count] = -1
        begins[row : row + count] = 0
        ends[row : row + count] = 0
        scratch.left[:] = budget
        scratch.found[:] = 0
        going = count
        while going > 0:  # in turns: a query has to wait for its last cluster, but not for those of the others
            largest_line(scratch.largest, groups, scratch.best, scratch.where)
            for t in range(count):
                if scratch.left[t] >= 0:
                    going -= _open_next(scratch, t, numbers, start, size, row + t, opened, begins, ends)


@device_function
def _load_queries(q: Any, first: int, count: int, spread: Any, scratch: Any) -> None:
    """``tile``; what is beyond the last query repeats it."""
    dim, width, numbers = q.shape[1], scratch.width, q.reshape(q.size)
    for t in range(TILE):
        row = min(t, count - 1)
        scratch.row[t] = row
        copy_numbers(numbers, (first + row) * dim, scratch.queries, row * width, dim)
        scratch.queries[row * width + dim : (row + 1) * width] = 0
    for base in range(0, TILE, LANES):
        for d in range(0, width, LANES):
            transpose_tile(
                scratch.queries, d, width, scratch.row, base, LANES, scratch.tile, d * TILE + base, TILE
            )  # fmt: skip
    squares = width * TILE
    for place in range(squares, scratch.tile.shape[0]):
        number = scratch.tile[place - squares]
        scratch.tile[place] = number * number * spread


@device_function
def _load_ranges(before: Any, low: Any, high: Any, first: int, count: int, scratch: Any) -> None:
    for r in range(low.shape[1]):
        begin, end, inner, outer = before.shape[0], 0, 0, before.shape[0]
        for t in range(TILE):
            lower = _index(before, low[first + min(t, count - 1), r])
            upper = _index(before, high[first + min(t, count - 1), r])
            scratch.low[r, t], scratch.high[r, t] = lower, upper
            if lower < upper:
                begin, end = min(begin, lower), max(end, upper)
            inner, outer = max(inner, lower), min(outer, upper)
        reach = scratch.reach[r]
        reach[0], reach[1], reach[2], reach[3] = begin, end, inner, outer


@device_function
def _index(before: Any, limit: int) -> int:
    """Where the slots from ``limit`` on begin among those that are not empty."""
    return before[min(max(limit, 0), before.shape[0] - 1)]


@device_function
def _score(rows: Any, scratch: Any) -> int:
    """``scores``, ``largest`` and ``group``; returns how many groups there are."""
    depth = scratch.tile.shape[0] // TILE
    begin, end, groups = np.int64(2**31), np.int64(0), 0
    for r in range(scratch.reach.shape[0]):
        begin, end = min(begin, scratch.reach[r, 0]), max(end, scratch.reach[r, 1])
    for group in range(begin // GROUP, (end + GROUP - 1) // GROUP):
        one, last = group * GROUP, (group + 1) * GROUP
        seen, whole = False, False
        for r in range(scratch.reach.shape[0]):
            reach = scratch.reach[r]
            seen |= reach[0] < last and one < reach[1]
            whole |= reach[2] <= one and last <= reach[3]
        if seen:
            at = groups * GROUP * TILE
            rows_by_tile(
                rows, one * depth, depth, scratch.tile, 0, depth, scratch.scores, at, scratch.largest, groups * TILE
            )  # fmt: skip
            if not whole:
                _drop_outside(one, at, groups * TILE, scratch)
            scratch.group[groups] = group
            groups += 1
    return groups


@device_function
def _drop_outside(first: int, at: int, there: int, scratch: Any) -> None:
    """What a query may not open is -inf, from cluster ``first`` on."""
    lowest = np.float32(-np.inf)
    scratch.largest[there : there + TILE] = lowest
    for j in range(GROUP):
        number = np.int32(first + j)
        scratch.inside[:] = 0
        for r in range(scratch.low.shape[0]):
            low, high = scratch.low[r], scratch.high[r]
            for t in range(TILE):
                scratch.inside[t] |= np.int32((low[t] <= number) & (number < high[t]))
        for t in range(TILE):
            score = scratch.scores[at + j * TILE + t]
            score = score if scratch.inside[t] else lowest
            scratch.scores[at + j * TILE + t] = score
            most = scratch.largest[there + t]
            scratch.largest[there + t] = score if score > most else most


@inlined_function
def _open_next(
    scratch: Any, t: int, numbers: Any, start: Any, size: Any, row: int, opened: Any, begins: Any, ends: Any
) -> int:
    """Open one more cluster for query t, or end it; returns how many queries ended, 0 or 1."""
    group = scratch.where[t]
    if scratch.best[t] == -np.inf:
        scratch.left[t] = -1
        return 1
    place = drop_largest(scratch.scores, group * GROUP * TILE + t, scratch.largest, group * TILE + t)
    number = numbers[scratch.group[group] * GROUP + place]
    keys, found = size[number], scratch.found[t]
    if keys > scratch.left[t]:
        scratch.left[t] = -1
        return 1
    opened[row, found] = number
    begins[row, found] = start[number]
    ends[row, found] = start[number] + keys
    scratch.found[t] = found + 1
    scratch.left[t] = scratch.left[t] - keys if found + 1 < opened.shape[1] else -1
    return 0 if found + 1 < opened.shape[1] else 1
