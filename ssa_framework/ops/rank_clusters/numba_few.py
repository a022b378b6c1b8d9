"""Ranking for few queries: clusters stand in strips, one in each lane of a vector, and are never turned round again.

`numba_rank` puts a query into each lane, which is a waste where there is one. A cluster's score is the same sum in the
same order here and there, so that decoding opens the clusters that prefill opens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_vectors import fma, load, splat, store

LANES = 16
STRIP = 64
"""Clusters of a strip: four sums, which do not wait for one another."""


class Strips(NamedTuple):
    """The clusters that are not empty, of each of R levels, in ascending order.

    Attributes:
        numbers: float32 ``[B · Hkv, strips, depth, STRIP]``, means and, if they count, variances.
        slots: int32 ``[B · Hkv, strips * STRIP]``, the number of each.
        before: int32 ``[B · Hkv, R, segments + 1]``, how many of them come before each segment of a level.
        base: int64 ``[R]``, the first strip of each level.
    """

    numbers: Any
    slots: Any
    before: Any
    base: Any


class FewScratch(NamedTuple):
    """Memory of one thread: the query with its scaled squares ``[depth]``; the scores of the strips that are seen, the
    largest of each, and which strips they are."""

    query: Any
    scores: Any
    largest: Any
    strip: Any


@bare_kernel
def fill_strips(
    strips: Strips, centroids: Any, variances: Any, parts: int, size: Any, pair: int, level: int, first: int,
    stop: int, each: int, slot: int, width: int,
) -> None:  # fmt: skip
    """Add the segments ``first .. stop`` of one head and level, of ``each`` slots.

    Args:
        centroids, variances: float32 ``[S, D]``. parts: 1 = no variances. size: int32 ``[S]``. slot: the first of the
            level.
    """
    before, dim = strips.before[pair, level], centroids.shape[1]
    for segment in range(first, stop):
        found = int(before[segment])
        for c in range(slot + segment * each, slot + (segment + 1) * each):
            if size[c] > 0:
                strip, lane = strips.base[level] + found // STRIP, found % STRIP
                for d in range(dim):
                    strips.numbers[pair, strip, d, lane] = centroids[c, d]
                    if parts > 1:
                        strips.numbers[pair, strip, width + d, lane] = variances[c, d]
                strips.slots[pair, strip * STRIP + lane] = c
                found += 1
        before[segment + 1] = found


@bare_kernel
def rank_few(
    q: Any, spread: Any, width: int, strips: Strips, start: Any, size: Any, first: Any, stop: Any, budget: int,
    group: int, heads: int, begin_head: int, end_head: int, scratch: FewScratch, out: Any,
) -> None:  # fmt: skip
    """The clusters that all queries of the heads ``begin_head .. end_head`` open, counted over all batch elements.

    Args:
        q: float32 ``[B · G, N, D]``. start, size: int32 ``[B · Hkv, S]``. first, stop: int32 ``[B or 1, N, R]``,
            segments. group: graph heads per KV head. heads: G. out: int32 ``[3, B · G, N, most]``, their numbers, and
            where their keys start and end.
    """
    opened, begins, ends = out[0], out[1], out[2]
    for head in range(begin_head, end_head):
        pair, batch = head // group, head // heads
        element = batch if first.shape[0] > 1 else 0
        for n in range(q.shape[1]):
            load_query(q[head, n], spread, width, scratch.query)
            count = 0
            for level in range(first.shape[2]):
                count = score_level(
                    strips, pair, level, first[element, n, level], stop[element, n, level], count, scratch
                )
            left = budget
            for p in range(opened.shape[2]):
                opened[head, n, p], begins[head, n, p], ends[head, n, p] = -1, 0, 0
            for p in range(opened.shape[2]):
                place = take_largest(count, scratch)
                if place < 0:
                    break
                number = strips.slots[pair, scratch.strip[place // STRIP] * STRIP + place % STRIP]
                keys = size[pair, number]
                if keys > left:
                    break
                left -= keys
                opened[head, n, p] = number
                begins[head, n, p], ends[head, n, p] = start[pair, number], start[pair, number] + keys


@device_function
def load_query(q: Any, spread: Any, width: int, query: Any) -> None:
    """The numbers of a query, and behind them their squares, scaled."""
    query[:] = 0
    for d in range(q.shape[0]):
        query[d] = q[d]
    for place in range(width, query.shape[0]):
        number = query[place - width]
        query[place] = number * number * spread


@device_function
def score_level(strips: Any, pair: int, level: int, first: int, stop: int, count: int, scratch: Any) -> int:
    """Score the clusters of the segments ``first .. stop``, behind ``count`` strips; returns how many they are."""
    numbers, before = strips.numbers[pair], strips.before[pair, level]
    low, high = int(before[first]), int(before[max(first, stop)])
    flat = numbers.reshape(numbers.size)
    depth, scores = numbers.shape[1], scratch.scores
    for strip in range(low // STRIP, (high + STRIP - 1) // STRIP):
        at, to = (strips.base[level] + strip) * depth * STRIP, count * STRIP
        s0 = s1 = s2 = s3 = splat(scores, np.float32(0))
        for d in range(depth):
            number, line = splat(scores, scratch.query[d]), at + d * STRIP
            s0, s1 = fma(number, load(flat, line), s0), fma(number, load(flat, line + LANES), s1)
            s2, s3 = fma(number, load(flat, line + 2 * LANES), s2), fma(number, load(flat, line + 3 * LANES), s3)
        store(scores, to, s0)
        store(scores, to + LANES, s1)
        store(scores, to + 2 * LANES, s2)
        store(scores, to + 3 * LANES, s3)
        for t in range(max(low - strip * STRIP, 0)):
            scores[to + t] = -np.inf
        for t in range(min(high - strip * STRIP, STRIP), STRIP):
            scores[to + t] = -np.inf
        scratch.strip[count] = strips.base[level] + strip
        find_largest(count, scratch)
        count += 1
    return count


@device_function
def find_largest(strip: int, scratch: Any) -> None:
    """A score that is not a number is never the largest."""
    most = np.float32(-np.inf)
    for t in range(strip * STRIP, (strip + 1) * STRIP):
        most = scratch.scores[t] if scratch.scores[t] > most else most
    scratch.largest[strip] = most


@device_function
def take_largest(count: int, scratch: Any) -> int:
    """The first of the largest scores, which is gone then; -1 where there is none."""
    most, best = np.float32(-np.inf), -1
    for strip in range(count):
        if scratch.largest[strip] > most:
            most, best = scratch.largest[strip], strip
    if best < 0:
        return -1
    place = best * STRIP
    while scratch.scores[place] != most:
        place += 1
    scratch.scores[place] = -np.inf
    find_largest(best, scratch)
    return place
