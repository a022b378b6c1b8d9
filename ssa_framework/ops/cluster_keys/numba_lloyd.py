"""Numba kernel of k-means: keys of a segment by centroids, fused with its argmax.

The keys are transposed once, in tiles that fit the nearest cache: a lane of a vector is a key, so that the largest
score is found lane by lane, in registers. A key's scores are summed in the same order in every lane and tile.

Rows of the work memory are the keys in another order, those that a coarse Lloyd step looks at first: those at every
``stride``-th place of the segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_tile_products import TILE, nearest_rows
from ssa_framework.ops.numba_vectors import add, copy_numbers, fma, load, store, sub, transpose_tile

LANES = 16


class Scratch(NamedTuple):
    """Memory of one task. Rows are ``width`` numbers long, D and zeros up to a multiple of `LANES`.

    Attributes:
        rows: float32 ``[L up to TILE, width]``, centred keys. tiles: the same, ``[tiles, width, TILE]``.
        centroids: float32 ``[clusters up to TILE_ROWS, width]``. norms: float32, minus half the square of each.
        mean: float32 ``[width]``, of all keys. sums: float32 ``[clusters, at least 2, width]``.
        counts: int32 ``[clusters]``.
        owner: int32 ``[L up to TILE]``, the centroid of each row.
    """

    rows: Any
    tiles: Any
    centroids: Any
    norms: Any
    mean: Any
    sums: Any
    counts: Any
    owner: Any
    width: int
    stride: int


@bare_kernel
def cluster_segments(
    k: Any, firsts: Any, f: int, end: int, length: int, initial: Any, steps: Any, capacity: int, slots: int,
    scratch: Any, order: Any, start: Any, size: Any, means: Any, variances: Any,
) -> None:  # fmt: skip
    """Cluster the keys of the segments from f to before ``end``; ``k`` is float32 ``[M, D]``.

    Args:
        firsts: int32 ``[F]``, the first key of every segment, -1 = not used.
        initial: int32 ``[clusters]``, places in a segment.
        steps: int32 ``[iterations]``, how many rows each Lloyd step looks at.
        slots: C, those of a segment.
        order, start, size: out, int32 ``[F * L]`` and ``[F * C]``. means, variances: out, float32 ``[F * C, D]``. They
            are zeros.
    """
    for segment in range(f, end):
        if firsts[segment] >= 0:
            _cluster_segment(
                k, firsts[segment], length, initial, steps, capacity, scratch, segment * length, segment * slots,
                order, start, size, means, variances,
            )  # fmt: skip


@device_function
def _cluster_segment(
    k: Any, first: int, length: int, initial: Any, steps: Any, capacity: int, scratch: Any, to: int, slot: int,
    order: Any, start: Any, size: Any, means: Any, variances: Any,
) -> None:  # fmt: skip
    """``to``: where the segment begins in ``order``. ``slot``: its first slot."""
    clusters, width = initial.shape[0], scratch.width
    _center(k, first, length, scratch)
    scratch.centroids[:] = 0
    scratch.norms[:] = -np.inf  # so that no key goes to what only fills the last rows up
    for c in range(clusters):
        row = _row(initial[c], length, scratch.stride)
        for d in range(width):
            scratch.centroids[c * width + d] = scratch.rows[row * width + d]
    for step in range(steps.shape[0]):
        _assign(steps[step], clusters, k.shape[1], scratch)
        _move(steps[step], clusters, scratch)
    _assign(length, clusters, k.shape[1], scratch)
    _write(k, first, length, clusters, capacity, scratch, to, slot, order, start, size, means, variances)


@device_function
def _row(place: int, length: int, stride: int) -> int:
    """The row of the key at a place of the segment."""
    before = place // stride
    return before if place == before * stride else (length - 1) // stride + place - before


@device_function
def _center(k: Any, first: int, length: int, scratch: Any) -> None:
    """``rows`` and ``tiles``; what lies beyond the last key is another key or zero, so that its scores are finite."""
    dim, width, mean = k.shape[1], scratch.width, scratch.mean
    numbers = k.reshape(k.size)
    mean[:] = 0
    for i in range(length):
        row = _row(i, length, scratch.stride) * width
        copy_numbers(numbers, (first + i) * dim, scratch.rows, row, dim)
        for d in range(dim, width):
            scratch.rows[row + d] = 0
        for d in range(0, width, LANES):
            store(mean, d, add(load(mean, d), load(scratch.rows, row + d)))
    share = np.float32(1) / np.float32(length)
    for d in range(width):
        mean[d] *= share
    for row in range(0, length * width, width):
        for d in range(0, width, LANES):
            store(scratch.rows, row + d, sub(load(scratch.rows, row + d), load(mean, d)))
    for i in range(scratch.owner.shape[0]):
        scratch.owner[i] = min(i, length - 1)
    for base in range(0, scratch.owner.shape[0], LANES):
        tile = base // TILE * width * TILE + base % TILE
        for d in range(0, width, LANES):
            transpose_tile(
                scratch.rows, d, width, scratch.owner, base, LANES, scratch.tiles, tile + d * TILE, TILE
            )  # fmt: skip


@device_function
def _assign(keys: int, clusters: int, dim: int, scratch: Any) -> None:
    """``owner`` of the first ``keys`` rows: the first centroid with the largest ``x·c - |c|²/2``."""
    width = scratch.width
    for c in range(clusters):
        total = np.float32(0)
        for d in range(dim):
            total += scratch.centroids[c * width + d] * scratch.centroids[c * width + d]
        scratch.norms[c] = np.float32(-0.5) * total
    for base in range(0, keys, TILE):
        nearest_rows(
            scratch.centroids, scratch.norms, scratch.norms.shape[0], width, scratch.tiles, base * width, dim,
            scratch.owner, base,
        )  # fmt: skip


@device_function
def _move(keys: int, clusters: int, scratch: Any) -> None:
    """Every centroid to the mean of its keys among the first rows; one without keys stays."""
    width = scratch.width
    scratch.sums[:] = 0
    scratch.counts[:] = 0
    for i in range(keys):
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
    start: Any, size: Any, means: Any, variances: Any,
) -> None:  # fmt: skip
    """Order the keys by a counting sort, cut clusters of more than ``capacity`` keys, take the means and variances of
    the pieces."""
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
        c = scratch.owner[_row(i, length, scratch.stride)]
        order[scratch.counts[c]] = first + i
        scratch.counts[c] += 1
    for s in range(begin_slot, slot):
        _moments(order, start[s], size[s], first, length, means[s], variances[s], scratch)


@device_function
def _moments(
    order: Any, begin: int, keys: int, first: int, length: int, mean: Any, variance: Any, scratch: Any
) -> None:
    """Means and variances of the coordinates of the keys ``order[begin : begin + keys]``."""
    width, sums = scratch.width, scratch.sums
    sums[: 2 * width] = 0
    share = np.float32(1) / np.float32(keys)
    for i in range(begin, begin + keys):
        row = _row(order[i] - first, length, scratch.stride) * width
        for d in range(0, width, LANES):
            store(sums, d, add(load(sums, d), load(scratch.rows, row + d)))
    for d in range(width):
        sums[d] *= share
    for i in range(begin, begin + keys):
        row = _row(order[i] - first, length, scratch.stride) * width
        for d in range(0, width, LANES):
            apart = sub(load(scratch.rows, row + d), load(sums, d))
            store(sums, width + d, fma(apart, apart, load(sums, width + d)))
    for d in range(mean.shape[0]):
        mean[d] = scratch.mean[d] + sums[d]
        variance[d] = sums[width + d] * share
