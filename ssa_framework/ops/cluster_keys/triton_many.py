"""Kernels of k-means with more centroids than a program holds: each step takes two launches.

The first gives tiles of keys to their centroids, which pass by some at a time; the second has a program for each
centroid, which looks for its keys among the owners and averages them. Centroids are what they are in `triton_lloyd`,
but kept as the two bfloat16 parts that are multiplied, beside what their scores begin with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.cluster_keys.triton_gather import _collect
from ssa_framework.ops.cluster_keys.triton_lloyd import _best, _bias, _initial, _keys, _parts, _segment, _tile


class Parts(NamedTuple):
    """Centroids as ``high`` + ``low``, bfloat16 ``[B, Hkv, F, CLUSTERS, W]``, their ``bias`` float32 ``[B, Hkv, F,
    CLUSTERS]``, and ``middle`` float32 ``[B, Hkv, F, W]``, the point that they are measured from; ``clusters`` of them
    are real, the others have a bias of -inf."""

    high: Any
    low: Any
    bias: Any
    middle: Any
    clusters: Any


@triton.jit
def begin_kernel(
    segments, table, D: tl.constexpr, W: tl.constexpr, CLUSTERS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Write the first centroids of segment ``program_id(0)``, ``ROWS`` at a time."""
    index, keys, _ = _segment(segments, tl.program_id(0))
    dims = tl.arange(0, W)
    total = tl.zeros((W,), tl.float32)
    for first in range(0, CLUSTERS, ROWS):
        total += tl.sum(_initial(keys, segments, first + tl.arange(0, ROWS), table.clusters, D, W), 0)
    middle = total / table.clusters
    tl.store(table.middle + index * W + dims, middle)
    for first in range(0, CLUSTERS, ROWS):
        number = first + tl.arange(0, ROWS)
        real = number < table.clusters
        initial = _initial(keys, segments, number, table.clusters, D, W)
        high, low = _parts(tl.where(real[:, None], initial - middle[None, :], 0.0))
        row = index * CLUSTERS + number
        at = row[:, None] * W + dims[None, :]
        tl.store(table.high + at, high)
        tl.store(table.low + at, low)
        tl.store(table.bias + row, tl.where(real, _bias(high, low, middle, PARTS), -float("inf")))


@triton.jit
def nearest_kernel(
    segments, table, owners, counts, tiles, keys_of_step, apart,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """``owners`` int16 ``[B, Hkv, F, L]`` of the keys of tile ``program_id(0)``, counted through all segments, of every
    ``apart``-th key; adds to ``counts`` int32 ``[B, Hkv, F, CLUSTERS]`` how many each centroid has."""
    tile = tl.program_id(0) % tiles
    index, keys, _ = _segment(segments, tl.program_id(0) // tiles)
    nth = tile * KEYS + tl.arange(0, KEYS)
    inside = nth < keys_of_step
    dims = tl.arange(0, W)
    middle = tl.load(table.middle + index * W + dims)
    x, rest = _tile(keys, segments, nth * apart, inside, middle, D, W, PARTS)
    first_row = index * CLUSTERS
    some = tl.arange(0, CHUNK)
    at = some[:, None] * W + dims[None, :]
    best = tl.full((KEYS,), -float("inf"), tl.float32)
    owner = tl.zeros((KEYS,), tl.int32)
    for first in range(0, table.clusters, CHUNK):
        bias = tl.load(table.bias + first_row + first + some)
        low = tl.load(table.low + (first_row + first) * W + at)
        high = tl.load(table.high + (first_row + first) * W + at)
        score, number = _best(x, rest, high, low, bias, CHUNK, PARTS)
        better = score > best  # so that the first of equals stays
        best = tl.where(better, score, best)
        owner = tl.where(better, first + number, owner)
    tl.store(owners + index * segments.length + nth, owner.to(tl.int16), mask=inside)
    # sums of integers: no order matters
    tl.atomic_add(counts + first_row + owner, 1, mask=inside, sem="relaxed")


@triton.jit
def mean_kernel(
    segments, table, owners, counts, scratch, keys_of_step, apart,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, PLACES: tl.constexpr, CLUSTERS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Move centroid ``program_id(0)``, counted through all segments, to the mean of its keys; one without keys stays.
    ``scratch`` int32 ``[B, Hkv, F, L]``."""
    mine = tl.program_id(0) % table.clusters
    index, keys, _ = _segment(segments, tl.program_id(0) // table.clusters)
    number = tl.arange(0, CLUSTERS)
    count = tl.load(counts + index * CLUSTERS + number)
    n = tl.sum(tl.where(number == mine, count, 0), 0)
    before = tl.sum(tl.where(number < mine, count, 0), 0)
    if n > 0:
        of_segment = index * segments.length
        ordered = scratch + of_segment + before
        _collect(owners + of_segment, mine, ordered, 0, keys_of_step, PLACES)
        tl.debug_barrier()  # read back in another order than written
        dims = tl.arange(0, W)
        middle = tl.load(table.middle + index * W + dims)
        total = tl.zeros((W,), tl.float32)
        place = tl.arange(0, KEYS)
        key = tl.load(ordered + place, mask=place < n, other=0)
        for first in range(0, n, KEYS):
            inside = first + place < n
            # asked for a step ahead: a large cluster waits for one load a step, not for two
            later = tl.load(ordered + first + KEYS + place, mask=first + KEYS + place < n, other=0)
            x = _keys(keys, segments, key * apart, inside, D, W).to(tl.float32) - middle[None, :]
            total += tl.sum(tl.where(inside[:, None], x, 0.0), 0)
            key = later
        high, low = _parts((total / n)[None, :])
        row = index * CLUSTERS + mine
        at = row * W + dims[None, :]
        tl.store(table.high + at, high)
        tl.store(table.low + at, low)
        tl.store(table.bias + row + tl.arange(0, 1), _bias(high, low, middle, PARTS))
