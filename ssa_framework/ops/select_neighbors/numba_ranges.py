"""Numba kernels that score slices of key orders, slice by slice instead of query by query.

Queries that look into the same slice are scored together: a strip of its keys, transposed, stays in the nearest cache
while those queries pass by, so the work is a small matrix product and each key row is read once per group of queries.
"""

from __future__ import annotations

from typing import Any

from ssa_framework.ops.numba_products import row_by_matrix
from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_vectors import copy_numbers, lanes, transpose_tile

GROUP = 256
"""Most queries that share a transposed strip."""
STRIP = 112
"""Most keys of a strip: with a head dim of 64, it takes 28 KiB of the nearest cache."""
_LANES = 16


@device_function
def _first_after(order: Any, start: int, end: int, position: int) -> int:
    """Place of the first key after ``position`` in the ascending slice ``order[start:end]``."""
    length = end - start
    while length > 0:  # the halves are taken without a branch, which would be mispredicted every other time
        half = (length + 1) // 2
        start += half if order[start + half - 1] <= position else 0
        length -= half
    return start


@device_function
def clip(order: Any, first: int, last: int, position: int, causal: bool, limit: int) -> tuple[int, int]:
    """The part of the slice ``order[first:last]`` that a query looks at, at most ``limit`` keys unless that is 0."""
    if causal or (limit > 0 and last - first > limit):
        split = _first_after(order, first, last, position)
        if causal:
            last = split
            if limit > 0:
                first = max(first, last - limit)
        else:
            first = min(max(split - limit // 2, first), max(last - limit, first))
            last = min(first + limit, last)
    return first, last


@bare_kernel
def clip_slices(
    order: Any, start: Any, end: Any, positions: Any, causal: bool, limit: int, firsts: Any, offsets: Any
) -> None:
    """The part of each slice that its query looks at, as `torch_gather._bounds` defines it.

    Args:
        order: int32 ``[S, L]``. start, end: int32 ``[R or 1, S, P]``. positions: int32 ``[R]``.
        limit: most keys of a slice, or 0.
        firsts: out, int32 ``[R, S·P]``: first place. offsets: out, int64 ``[R·S·P + 1]``: where the scores of each
            slice are stored; the difference of two is its length.
    """
    rows, orders, slices = positions.shape[0], start.shape[1], start.shape[2]
    shared = start.shape[0] == 1
    offsets[0] = 0
    for r in range(rows):
        for s in range(orders):
            for p in range(slices):
                first, last = clip(
                    order[s],
                    start[0 if shared else r, s, p],
                    end[0 if shared else r, s, p],
                    positions[r],
                    causal,
                    limit,
                )
                place = (r * orders + s) * slices + p
                firsts[r, s * slices + p] = first
                offsets[place + 1] = offsets[place] + max(last - first, 0)


@bare_kernel
def score_slices(
    q: Any, k: Any, order: Any, firsts: Any, offsets: Any, scores: Any, work: Any, integers: Any, group: Any
) -> None:
    """Score the keys of all slices.

    Args:
        q: ``[R, D]``. k: ``[M, D]``. order: int32 ``[S, L]``. firsts, offsets: of `clip_slices`.
        scores: out, floating ``[total]``.
        work: scratch, floating ``[(D + 1)·STRIP]``. integers: scratch, int64 ``[L + 2 + R·P]``. group: scratch, int64
            ``[GROUP, 4]``: query, first and last place, and where the scores of place 0 would lie.
    """
    dim = q.shape[1]
    orders, length = order.shape
    slices = firsts.shape[1] // orders
    strip, sums = work[: dim * STRIP], work[dim * STRIP :]
    queries, keys = q.reshape(q.size), k.reshape(k.size)
    pairs = integers[length + 2 :]
    for s in range(orders):
        count = _by_start(firsts, offsets, s, slices, integers[: length + 2], pairs)
        place = 0
        while place < count:
            low, high, taken = length, 0, 0
            while place + taken < count and taken < GROUP:
                pair = pairs[place + taken]
                r, p = pair // slices, pair % slices
                index = (r * orders + s) * slices + p
                first = firsts[r, s * slices + p]
                last = first + offsets[index + 1] - offsets[index]
                if taken and first >= high:
                    break  # a slice that does not overlap with the others has keys of its own
                low, high = min(low, first), max(high, last)
                group[taken, 0], group[taken, 1], group[taken, 2] = r, first, last
                group[taken, 3] = offsets[index] - first
                taken += 1
            strips = (high - low + STRIP - 1) // STRIP
            size = (high - low + strips - 1) // strips  # equal strips waste the fewest lanes
            for left in range(low, high, size):
                _transpose(keys, dim, order[s], left, min(left + size, high), strip)
                _score_strip(queries, dim, strip, left, min(left + size, high), group, taken, sums, scores)
            place += taken


@device_function
def _by_start(firsts: Any, offsets: Any, s: int, slices: int, bins: Any, pairs: Any) -> int:
    """Pairs (query, slice) of one order with a key or more, by first place: a counting sort. Returns how many."""
    rows, orders = firsts.shape[0], firsts.shape[1] // slices
    bins[:] = 0
    for r in range(rows):
        for p in range(slices):
            index = (r * orders + s) * slices + p
            if offsets[index + 1] > offsets[index]:
                bins[firsts[r, s * slices + p] + 1] += 1
    for i in range(bins.shape[0] - 1):
        bins[i + 1] += bins[i]
    count = bins[bins.shape[0] - 1]
    for r in range(rows):
        for p in range(slices):
            index = (r * orders + s) * slices + p
            if offsets[index + 1] > offsets[index]:
                first = firsts[r, s * slices + p]
                pairs[bins[first]] = r * slices + p
                bins[first] += 1
    return int(count)


@device_function
def _transpose(keys: Any, dim: int, order: Any, left: int, right: int, strip: Any) -> None:
    """Keys ``order[left:right]`` as columns of ``strip [D, STRIP]``; columns up to a whole register hold some key."""
    width = lanes(keys)
    whole = dim - dim % width
    for j in range(0, right - left, width):
        count = min(width, right - left - j)
        for d in range(0, whole, width):
            transpose_tile(keys, d, dim, order, left + j, count, strip, d * STRIP + j, STRIP)
        for t in range(width):
            row = order[left + j + min(t, count - 1)]
            for d in range(whole, dim):
                strip[d * STRIP + j + t] = keys[row * dim + d]


@device_function
def _score_strip(
    q: Any, dim: int, strip: Any, left: int, right: int, group: Any, taken: int, sums: Any, scores: Any
) -> None:
    """A group of queries by a strip of keys; each query's part goes to its place in ``scores``."""
    for t in range(taken):
        first, last = max(left, group[t, 1]), min(right, group[t, 2])
        if first >= last:
            continue
        start = (first - left) // _LANES * _LANES  # whole registers that hold the query's part
        width = (last - left - start + _LANES - 1) // _LANES * _LANES
        row_by_matrix(q, group[t, 0] * dim, dim, strip, start, STRIP, width, sums, 0)
        out, shift = group[t, 3], left + start
        copy_numbers(sums, first - shift, scores, out + first, last - first)


@bare_kernel
def expand_slices(order: Any, firsts: Any, offsets: Any, keys: Any) -> None:
    """The keys of all slices, in the order of their scores: int32 ``[total]``."""
    slices = firsts.shape[1] // order.shape[0]
    for r in range(firsts.shape[0]):
        for i in range(firsts.shape[1]):
            place, s, first = r * firsts.shape[1] + i, i // slices, firsts[r, i]
            for j in range(offsets[place + 1] - offsets[place]):
                keys[offsets[place] + j] = order[s, first + j]
