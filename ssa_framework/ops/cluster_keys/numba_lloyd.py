"""Numba kernel of k-means: keys of a segment by centroids, fused with its argmax.

The keys are transposed once, in tiles that fit the nearest cache: a lane of a vector is a key, so that the largest
score is found lane by lane. A key's scores are summed in the same order in every lane and tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_simd import add, fma, load, splat, store, transpose_tile

LANES = 16
TILE = 2 * LANES
"""Keys scored at once."""
TOGETHER = 4
"""Centroids scored at once: with two vectors of keys, eight sums, which fit the registers and do not wait."""


class Scratch(NamedTuple):
    """Memory of one task. Rows are ``width`` numbers long, D and zeros up to a multiple of `LANES`.

    Attributes:
        rows: float32 ``[L up to TILE, width]``, centred keys. tiles: the same, ``[tiles, width, TILE]``.
        centroids: float32 ``[clusters up to TOGETHER, width]``. norms: float32, minus half the square of each.
        sums: float32 ``[clusters, width]``. counts: int32 ``[clusters]``.
        scores: float32 ``[clusters up to TOGETHER, TILE]``. best: float32 ``[TILE]``.
        owner: int32 ``[L up to TILE]``, the centroid of each key.
    """

    rows: Any
    tiles: Any
    centroids: Any
    norms: Any
    sums: Any
    counts: Any
    scores: Any
    best: Any
    owner: Any
    width: int


@bare_kernel
def cluster_segment(
    k: Any, first: int, length: int, initial: Any, iterations: int, capacity: int, scratch: Any, to: int, slot: int,
    order: Any, start: Any, size: Any, means: Any,
) -> None:  # fmt: skip
    """Cluster the keys ``k[first : first + length]``, float32 ``[M, D]``.

    Args:
        initial: int32 ``[clusters]``, places in the segment.
        to: where the segment begins in ``order``, int32. slot: its first slot in ``start`` and ``size``, int32, and
            ``means``, float32 ``[slots, D]``; they are zeros.
    """
    clusters, width = initial.shape[0], scratch.width
    _center(k, first, length, scratch)
    scratch.centroids[:] = 0
    scratch.norms[:] = 0
    for c in range(clusters):
        for d in range(width):
            scratch.centroids[c * width + d] = scratch.rows[initial[c] * width + d]
    _assign(length, clusters, k.shape[1], scratch)
    for _ in range(iterations):
        _move(length, clusters, scratch)
        _assign(length, clusters, k.shape[1], scratch)
    _write(k, first, length, clusters, capacity, scratch, to, slot, order, start, size, means)


@device_function
def _center(k: Any, first: int, length: int, scratch: Any) -> None:
    """``rows`` and ``tiles``; what lies beyond the last key is another key or zero, so that its scores are finite."""
    dim, width = k.shape[1], scratch.width
    mean = scratch.sums
    mean[:width] = 0
    for i in range(length):
        for d in range(dim):
            mean[d] += k[first + i, d]
    share = np.float32(1) / np.float32(length)
    for d in range(dim):
        mean[d] *= share
    for i in range(length):
        for d in range(dim):
            scratch.rows[i * width + d] = k[first + i, d] - mean[d]
        for d in range(dim, width):
            scratch.rows[i * width + d] = 0
    for i in range(scratch.owner.shape[0]):
        scratch.owner[i] = min(i, length - 1)
    for base in range(0, scratch.owner.shape[0], LANES):
        tile = base // TILE * width * TILE + base % TILE
        for d in range(0, width, LANES):
            transpose_tile(
                scratch.rows, d, width, scratch.owner, base, LANES, scratch.tiles, tile + d * TILE, TILE
            )  # fmt: skip


@device_function
def _assign(length: int, clusters: int, dim: int, scratch: Any) -> None:
    """``owner``: the first centroid with the largest ``x·c - |c|²/2``."""
    width = scratch.width
    for c in range(clusters):
        total = np.float32(0)
        for d in range(dim):
            total += scratch.centroids[c * width + d] * scratch.centroids[c * width + d]
        scratch.norms[c] = np.float32(-0.5) * total
    for base in range(0, length, TILE):
        for c in range(0, clusters, TOGETHER):
            _score(scratch.tiles, base * width, dim, scratch.centroids, c, width, scratch.norms, scratch.scores)
        owner, best = scratch.owner[base : base + TILE], scratch.best
        for t in range(TILE):
            owner[t] = 0
            best[t] = scratch.scores[t]
        for c in range(1, clusters):
            for t in range(TILE):
                score = scratch.scores[c * TILE + t]
                owner[t] = c if score > best[t] else owner[t]
                best[t] = score if score > best[t] else best[t]


@device_function
def _score(tiles: Any, at: int, dim: int, centroids: Any, c: int, width: int, norms: Any, scores: Any) -> None:
    """Scores of a tile of keys with centroids c to c + 3."""
    low0 = high0 = splat(scores, norms[c])
    low1 = high1 = splat(scores, norms[c + 1])
    low2 = high2 = splat(scores, norms[c + 2])
    low3 = high3 = splat(scores, norms[c + 3])
    row = c * width
    for d in range(dim):
        low, high = load(tiles, at + d * TILE), load(tiles, at + d * TILE + LANES)
        number = splat(scores, centroids[row + d])
        low0, high0 = fma(number, low, low0), fma(number, high, high0)
        number = splat(scores, centroids[row + width + d])
        low1, high1 = fma(number, low, low1), fma(number, high, high1)
        number = splat(scores, centroids[row + 2 * width + d])
        low2, high2 = fma(number, low, low2), fma(number, high, high2)
        number = splat(scores, centroids[row + 3 * width + d])
        low3, high3 = fma(number, low, low3), fma(number, high, high3)
    to = c * TILE
    store(scores, to, low0)
    store(scores, to + LANES, high0)
    store(scores, to + TILE, low1)
    store(scores, to + TILE + LANES, high1)
    store(scores, to + 2 * TILE, low2)
    store(scores, to + 2 * TILE + LANES, high2)
    store(scores, to + 3 * TILE, low3)
    store(scores, to + 3 * TILE + LANES, high3)


@device_function
def _move(length: int, clusters: int, scratch: Any) -> None:
    """Every centroid to the mean of its keys; one without keys stays."""
    width = scratch.width
    scratch.sums[:] = 0
    scratch.counts[:] = 0
    for i in range(length):
        c = int(scratch.owner[i])
        scratch.counts[c] += 1
        for d in range(0, width, LANES):
            total = add(load(scratch.sums, c * width + d), load(scratch.rows, i * width + d))
            store(scratch.sums, c * width + d, total)
    for c in range(clusters):
        if scratch.counts[c] > 0:
            for d in range(c * width, (c + 1) * width):
                scratch.centroids[d] = scratch.sums[d] / np.float32(scratch.counts[c])


@device_function
def _write(
    k: Any, first: int, length: int, clusters: int, capacity: int, scratch: Any, to: int, slot: int, order: Any,
    start: Any, size: Any, means: Any,
) -> None:  # fmt: skip
    """Order the keys by a counting sort, cut clusters of more than ``capacity`` keys, take the means of the pieces."""
    scratch.counts[:] = 0
    for i in range(length):
        scratch.counts[scratch.owner[i]] += 1
    end, begin_slot = to, slot
    for c in range(clusters):
        keys, begin = int(scratch.counts[c]), end
        end += keys
        scratch.counts[c] = begin  # from here on, where the next key of the cluster goes
        pieces = (keys + capacity - 1) // capacity
        for p in range(pieces):
            start[slot] = begin + p * keys // pieces
            size[slot] = begin + (p + 1) * keys // pieces - start[slot]
            slot += 1
    for i in range(length):
        c = scratch.owner[i]
        order[scratch.counts[c]] = first + i
        scratch.counts[c] += 1
    for s in range(begin_slot, slot):
        for i in range(start[s], start[s] + size[s]):
            for d in range(means.shape[1]):
                means[s, d] += k[order[i], d]
        share = np.float32(1) / np.float32(size[s])
        for d in range(means.shape[1]):
            means[s, d] *= share
