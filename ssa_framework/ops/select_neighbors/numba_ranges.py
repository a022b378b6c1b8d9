"""Numba kernels that score slices of key orders, slice by slice instead of query by query.

Queries that look into the same slice are scored together: a strip of its keys, transposed, stays in the nearest cache
while those queries pass by, so the work is a small matrix product and each key row is read once per group of queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssa_framework.ops.numba_runtime import device_function, kernel

GROUP = 256
"""Most queries that share a transposed strip."""
STRIP = 112
"""Most keys of a strip: with a head dim of 64, it takes 28 KiB of the nearest cache."""
_LANES = 16


@device_function
def _first_after(order: Any, start: int, end: int, position: int) -> int:
    """Place of the first key after ``position`` in the ascending slice ``order[start:end]``."""
    while start < end:
        middle = (start + end) // 2
        if order[middle] <= position:
            start = middle + 1
        else:
            end = middle
    return start


@kernel
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
                first, last = start[0 if shared else r, s, p], end[0 if shared else r, s, p]
                if causal or (limit > 0 and last - first > limit):
                    split = _first_after(order[s], first, last, positions[r])
                    if causal:
                        last = split
                        if limit > 0:
                            first = max(first, last - limit)
                    else:
                        first = min(max(split - limit // 2, first), max(last - limit, first))
                        last = min(first + limit, last)
                place = (r * orders + s) * slices + p
                firsts[r, s * slices + p] = first
                offsets[place + 1] = offsets[place] + max(last - first, 0)


@kernel
def score_slices(q: Any, k: Any, order: Any, firsts: Any, offsets: Any, scores: Any, work: Any, integers: Any) -> None:
    """Score the keys of all slices.

    Args:
        q: ``[R, D]``. k: ``[M, D]``. order: int32 ``[S, L]``. firsts, offsets: of `clip_slices`.
        scores: out, floating ``[total]``.
        work: scratch, floating ``[(D + 1)·STRIP]``. integers: scratch, int64 ``[L + 2 + R·P]``.
    """
    dim = q.shape[1]
    orders, length = order.shape
    slices = firsts.shape[1] // orders
    group = np.empty(GROUP, np.int64)
    bounds = np.empty((GROUP, 3), np.int64)
    strip = work[: dim * STRIP].reshape((dim, STRIP))
    sums = work[dim * STRIP :]
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
                group[taken] = r
                bounds[taken, 0], bounds[taken, 1], bounds[taken, 2] = first, last, offsets[index] - first
                taken += 1
            strips = (high - low + STRIP - 1) // STRIP
            size = (high - low + strips - 1) // strips  # equal strips waste the fewest lanes
            for left in range(low, high, size):
                _transpose(k, order[s], left, min(left + size, high), strip)
                _score_strip(q, strip, left, min(left + size, high), group, bounds, taken, sums, scores)
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
def _transpose(k: Any, order: Any, left: int, right: int, strip: Any) -> None:
    """Keys ``order[left:right]`` as columns of ``strip [D, STRIP]``, zeros up to a whole number of registers."""
    width = right - left
    padded = (width + _LANES - 1) // _LANES * _LANES
    whole = width - width % 8
    for j in range(0, whole, 8):  # eight keys at a time, so that a cache line of the strip is written at once
        at = left + j
        r0, r1, r2, r3 = k[order[at]], k[order[at + 1]], k[order[at + 2]], k[order[at + 3]]
        r4, r5, r6, r7 = k[order[at + 4]], k[order[at + 5]], k[order[at + 6]], k[order[at + 7]]
        for d in range(strip.shape[0]):
            out = strip[d]
            out[j], out[j + 1], out[j + 2], out[j + 3] = r0[d], r1[d], r2[d], r3[d]
            out[j + 4], out[j + 5], out[j + 6], out[j + 7] = r4[d], r5[d], r6[d], r7[d]
    for j in range(whole, width):
        row = k[order[left + j]]
        for d in range(strip.shape[0]):
            strip[d, j] = row[d]
    for d in range(strip.shape[0]):
        for j in range(width, padded):
            strip[d, j] = 0


@device_function
def _score_strip(
    q: Any, strip: Any, left: int, right: int, group: Any, bounds: Any, taken: int, sums: Any, scores: Any
) -> None:
    """A group of queries by a strip of keys; each query's part goes to its place in ``scores``."""
    dim = strip.shape[0]
    padded = (right - left + _LANES - 1) // _LANES * _LANES
    whole = dim - dim % 8
    for t in range(taken):
        first, last = max(left, bounds[t, 0]), min(right, bounds[t, 1])
        if first >= last:
            continue
        row = q[group[t]]
        for j in range(padded):
            sums[j] = 0
        for d in range(0, whole, 8):  # eight products for every load and store of a sum
            a0, a1, a2, a3 = row[d], row[d + 1], row[d + 2], row[d + 3]
            a4, a5, a6, a7 = row[d + 4], row[d + 5], row[d + 6], row[d + 7]
            for j in range(padded):
                sums[j] += (
                    a0 * strip[d, j]
                    + a1 * strip[d + 1, j]
                    + a2 * strip[d + 2, j]
                    + a3 * strip[d + 3, j]
                    + a4 * strip[d + 4, j]
                    + a5 * strip[d + 5, j]
                    + a6 * strip[d + 6, j]
                    + a7 * strip[d + 7, j]
                )
        for d in range(whole, dim):
            for j in range(padded):
                sums[j] += row[d] * strip[d, j]
        out = bounds[t, 2]
        for j in range(first, last):
            scores[out + j] = sums[j - left]


@kernel
def expand_slices(order: Any, firsts: Any, offsets: Any, keys: Any) -> None:
    """The keys of all slices, in the order of their scores: int32 ``[total]``."""
    slices = firsts.shape[1] // order.shape[0]
    for r in range(firsts.shape[0]):
        for i in range(firsts.shape[1]):
            place, s, first = r * firsts.shape[1] + i, i // slices, firsts[r, i]
            for j in range(offsets[place + 1] - offsets[place]):
                keys[offsets[place] + j] = order[s, first + j]
