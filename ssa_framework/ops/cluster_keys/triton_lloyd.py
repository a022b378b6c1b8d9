"""Kernels of k-means: steps of a whole segment or of a part of it, who belongs to whom, and the clusters in order.

Centroids are kept as differences from a point near the keys of the segment, the mean of the first centroids, as float32
``[CLUSTERS, W]``. They are multiplied in two bfloat16 parts, and the sum of these parts is what counts as the centroid,
in the products and in its square. bfloat16 keys are multiplied as they are, others as two parts of their difference
from that point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import dot


class Segments(NamedTuple):
    """Keys ``[B, Hkv, M, D]`` with their strides, and the ``count`` segments of ``length`` keys in them: ``starts``
    int32 ``[B, count]``, whose stride along the batch is ``starts_batch``."""

    k: Any
    k_batch: Any
    k_head: Any
    k_key: Any
    k_dim: Any
    starts: Any
    starts_batch: Any
    count: Any
    length: Any


class Centroids(NamedTuple):
    """``table`` float32 ``[B, Hkv, F, CLUSTERS, W]`` and ``middle`` float32 ``[B, Hkv, F, W]``, the point that they are
    measured from; ``clusters`` of them are real."""

    table: Any
    middle: Any
    clusters: Any


@triton.jit
def _segment(segments, number):
    """The number of this segment among all, of int64, where its keys begin, and its start, -1 = not used."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(segments.starts + batch * segments.starts_batch + number)
    keys = segments.k + batch * segments.k_batch + head * segments.k_head
    # what is not used is computed as if it began at the first key
    keys += tl.maximum(start, 0).to(tl.int64) * segments.k_key
    return (batch * tl.num_programs(1) + head) * segments.count + number, keys, start


@triton.jit
def _keys(keys, segments, place, inside, D: tl.constexpr, W: tl.constexpr):
    """Keys ``place [S]``: ``[S, W]``, zeros where not ``inside``."""
    dims = tl.arange(0, W)[None, :]
    at = place[:, None].to(tl.int64) * segments.k_key + dims * segments.k_dim
    return tl.load(keys + at, mask=inside[:, None] & (dims < D), other=0.0)


@triton.jit
def _initial(keys, segments, number, clusters, D: tl.constexpr, W: tl.constexpr):
    """Centroids ``number [C]`` before the first step, keys at even distances: float32 ``[C, W]``, zeros from
    ``clusters`` on."""
    place = number.to(tl.int64) * (segments.length - 1) // tl.maximum(clusters - 1, 1)
    return _keys(keys, segments, place, number < clusters, D, W).to(tl.float32)


@triton.jit
def _parts(x):
    """bfloat16 tensors whose sum is float32 ``x``, up to a 2**-17th of it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _bias(high, low, middle, PARTS: tl.constexpr):
    """What the scores of centroids begin with ``[C]``, from their parts ``[C, W]``."""
    whole = high.to(tl.float32) + low.to(tl.float32)
    bias = tl.sum(whole * whole, 1) / -2
    if PARTS == 1:  # keys are multiplied without being centred
        bias -= tl.sum(whole * middle[None, :], 1)
    return bias


@triton.jit
def _read(centroids, index, CLUSTERS: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """Two parts ``[CLUSTERS, W]`` of the centroids, what their scores begin with ``[CLUSTERS]``, and the middle."""
    dims = tl.arange(0, W)
    number = tl.arange(0, CLUSTERS)
    middle = tl.load(centroids.middle + index * W + dims)
    at = (index * CLUSTERS + number[:, None]) * W + dims[None, :]
    high, low = _parts(tl.load(centroids.table + at))
    bias = _bias(high, low, middle, PARTS)
    return high, low, tl.where(number < centroids.clusters, bias, -float("inf")), middle


@triton.jit
def _best(x, rest, high, low, bias, CLUSTERS: tl.constexpr, PARTS: tl.constexpr):
    """The best score of each row of ``x + rest [S, W]``, and the first centroid that has it, int32 ``[S]``."""
    scores = dot(x, tl.trans(low), tl.zeros((x.shape[0], CLUSTERS), tl.float32), "ieee")
    if PARTS == 2:
        scores = dot(rest, tl.trans(high), scores, "ieee")
    scores = dot(x, tl.trans(high), scores, "ieee") + bias[None, :]
    number = tl.arange(0, CLUSTERS)[None, :]
    best = tl.max(scores, 1)
    first = tl.min(tl.where(scores == best[:, None], number, CLUSTERS), 1)
    return best, tl.where(first < CLUSTERS, first, 0)  # a row of NaNs equals nothing


@triton.jit
def _tile(keys, segments, place, inside, middle, D: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """Keys ``[S, W]`` as they are multiplied: themselves, or two parts of their difference from ``middle``."""
    x = _keys(keys, segments, place, inside, D, W)
    if PARTS == 1:
        return x, x
    return _parts(tl.where(inside[:, None], x.to(tl.float32) - middle[None, :], 0.0))


@triton.jit
def _members(owner, inside, number):
    """bfloat16 ``[CLUSTERS, S]``: 1 where a key belongs to a centroid."""
    members = (owner[None, :] == number[:, None]) & inside[None, :]
    return members.to(tl.float32).to(tl.bfloat16)  # the interpreter cannot make bfloat16 of integers


@triton.jit
def _added(members, size, KEYS: tl.constexpr):
    """``size [CLUSTERS, 16]``, all columns alike, and the keys of each centroid: a product takes fewer instructions
    than a sum across lanes, and is as exact."""
    return dot(members, tl.full((KEYS, 16), 1.0, tl.bfloat16), size, "ieee")


@triton.jit
def _sums(
    keys, segments, centroids, index, first_key, last_key, apart,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums ``[CLUSTERS, W]`` and numbers ``[CLUSTERS]``, float32, of the keys of each centroid, of every ``apart``-th
    key."""
    high, low, bias, middle = _read(centroids, index, CLUSTERS, W, PARTS)
    number = tl.arange(0, CLUSTERS)
    sums = tl.zeros((CLUSTERS, W), tl.float32)
    size = tl.zeros((CLUSTERS, 16), tl.float32)
    for first in range(first_key, last_key, KEYS):
        nth = first + tl.arange(0, KEYS)
        inside = nth < last_key
        x, rest = _tile(keys, segments, nth * apart, inside, middle, D, W, PARTS)
        _, owner = _best(x, rest, high, low, bias, CLUSTERS, PARTS)
        members = _members(owner, inside, number)
        size = _added(members, size, KEYS)
        if PARTS == 2:
            sums = dot(members, rest, sums, "ieee")
        sums = dot(members, x, sums, "ieee")
    return sums, tl.max(size, 1)


@triton.jit
def _moved(sums, size, middle, before, PARTS: tl.constexpr):
    """The centroids with these ``sums [CLUSTERS, W]`` of keys; as ``before`` where there are none."""
    mean = sums / tl.maximum(size, 1.0)[:, None]
    if PARTS == 1:
        mean -= middle[None, :]
    return tl.where((size > 0)[:, None], mean, before)


@triton.jit
def _assign(
    keys, segments, centroids, index, owners, first_key, last_key,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the ``owners`` of the keys of a part; returns how many each centroid has, int32 ``[CLUSTERS]``."""
    high, low, bias, middle = _read(centroids, index, CLUSTERS, W, PARTS)
    number = tl.arange(0, CLUSTERS)
    count = tl.zeros((CLUSTERS, 16), tl.float32)
    for first in range(first_key, last_key, KEYS):
        place = first + tl.arange(0, KEYS)
        inside = place < last_key
        x, rest = _tile(keys, segments, place, inside, middle, D, W, PARTS)
        _, owner = _best(x, rest, high, low, bias, CLUSTERS, PARTS)
        tl.store(owners + index * segments.length + place, owner.to(tl.int16), mask=inside)
        count = _added(_members(owner, inside, number), count, KEYS)
    return tl.max(count, 1).to(tl.int32)


@triton.jit
def lloyd_kernel(
    segments, centroids, owners, counts, coarse, coarse_keys, stride, steps,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """The first ``steps`` of segment ``program_id(0)``, of which ``coarse`` look at ``coarse_keys`` keys, ``stride``
    apart. ``LAST``: these are all; write ``owners`` int16 ``[B, Hkv, F, L]`` and ``counts`` int32 ``[B, Hkv, F, 1,
    CLUSTERS]``."""
    index, keys, _ = _segment(segments, tl.program_id(0))
    number = tl.arange(0, CLUSTERS)
    dims = tl.arange(0, W)
    real = number < centroids.clusters
    initial = _initial(keys, segments, number, centroids.clusters, D, W)
    middle = tl.sum(initial, 0) / centroids.clusters
    tl.store(centroids.middle + index * W + dims, middle)
    table = centroids.table + ((index * CLUSTERS + number[:, None]) * W + dims[None, :])
    tl.store(table, tl.where(real[:, None], initial - middle[None, :], 0.0))
    tl.debug_barrier()  # read back in another order than written
    for step in range(steps):
        apart = tl.where(step < coarse, stride, 1)
        last = tl.where(step < coarse, coarse_keys, segments.length)
        sums, size = _sums(keys, segments, centroids, index, 0, last, apart, D, W, KEYS, CLUSTERS, PARTS)
        moved = _moved(sums, size, tl.load(centroids.middle + index * W + dims), tl.load(table), PARTS)
        tl.debug_barrier()
        tl.store(table, moved)
        tl.debug_barrier()
    if LAST:
        count = _assign(keys, segments, centroids, index, owners, 0, segments.length, D, W, KEYS, CLUSTERS, PARTS)
        tl.store(counts + index * CLUSTERS + number, count)


@triton.jit
def sum_kernel(
    segments, centroids, sums, sizes, parts, keys_of_part,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums float32 ``[B, Hkv, F, parts, CLUSTERS, W]`` and sizes ``[B, Hkv, F, parts, CLUSTERS]`` of part
    ``program_id(0)``, counted through all segments."""
    part = tl.program_id(0) % parts
    index, keys, _ = _segment(segments, tl.program_id(0) // parts)
    first = part * keys_of_part
    last = tl.minimum(first + keys_of_part, segments.length)
    total, size = _sums(keys, segments, centroids, index, first, last, 1, D, W, KEYS, CLUSTERS, PARTS)
    number = tl.arange(0, CLUSTERS)
    out = (index * parts + part) * CLUSTERS + number
    tl.store(sizes + out, size)
    tl.store(sums + out[:, None] * W + tl.arange(0, W)[None, :], total)


@triton.jit
def move_kernel(
    centroids, sums, sizes, parts, W: tl.constexpr, CLUSTERS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Move ``ROWS`` centroids to the means of their keys, adding up the parts of the segment in order."""
    dims = tl.arange(0, W)
    blocks: tl.constexpr = CLUSTERS // ROWS
    index = tl.program_id(0).to(tl.int64) // blocks
    number = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, W), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        at = (index * parts + part) * CLUSTERS + number
        size += tl.load(sizes + at)
        total += tl.load(sums + at[:, None] * W + dims[None, :])
    table = centroids.table + ((index * CLUSTERS + number)[:, None] * W + dims[None, :])
    moved = _moved(total, size, tl.load(centroids.middle + index * W + dims), tl.load(table), PARTS)
    tl.store(table, moved)


@triton.jit
def assign_kernel(
    segments, centroids, owners, counts, parts, keys_of_part,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``owners`` int16 ``[B, Hkv, F, L]`` and ``counts`` int32 ``[B, Hkv, F, parts, CLUSTERS]`` of part
    ``program_id(0)``, counted through all segments."""
    part = tl.program_id(0) % parts
    index, keys, _ = _segment(segments, tl.program_id(0) // parts)
    first = part * keys_of_part
    last = tl.minimum(first + keys_of_part, segments.length)
    count = _assign(keys, segments, centroids, index, owners, first, last, D, W, KEYS, CLUSTERS, PARTS)
    tl.store(counts + (index * parts + part) * CLUSTERS + tl.arange(0, CLUSTERS), count)
