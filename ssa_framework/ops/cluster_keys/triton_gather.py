"""Kernels that put the keys of a segment in the order of its clusters, cut large ones, and average each piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.cluster_keys.triton_lloyd import _keys, _segment


class Found(NamedTuple):
    """The fields of `Clusters`; ``slots`` of a segment."""

    order: Any
    start: Any
    size: Any
    centroids: Any
    variances: Any
    slots: Any


@triton.jit
def _collect(owners, mine, into, first_key, keys, PLACES: tl.constexpr):
    """Write the numbers of the keys that ``mine`` owns of ``keys``, counted from ``first_key`` on, one after the
    other."""
    row = tl.arange(0, PLACES // 8) * 8
    column = tl.arange(0, 8)[None, :]
    seen = tl.zeros((), tl.int32)
    for first in range(0, keys, PLACES):
        place = first + row[:, None] + column
        owned = tl.load(owners + place, mask=place < keys, other=-1) == mine
        # few of the keys are owned: a bit for each, and as many stores as a row of eight has at most
        count = tl.sum(owned.to(tl.int32), 1)
        bits = tl.sum(tl.where(owned, 1 << column, 0), 1)
        at = seen + tl.cumsum(count, 0) - count
        for nth in range(tl.max(count, 0)):
            lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
            bit = (lowest >> 23) - 127  # the exponent
            tl.store(into + at + nth, first_key + first + row + bit, mask=bits > 0)
            bits &= bits - 1
        seen += tl.sum(count, 0)


@triton.jit
def order_kernel(
    segments, owners, counts, parts, clusters, capacity, found, CLUSTERS: tl.constexpr, PLACES: tl.constexpr
):
    """The keys of one centroid of a segment, ``program_id(0)``, counted through all segments, and where its pieces are.

    A counting sort: what the centroids before it own is before its keys, and these keep their order. Slots that no
    piece takes are shared by the programs of the segment, which write zeros there.
    """
    mine = tl.program_id(0) % clusters
    number_of_segment = tl.program_id(0) // clusters
    index, _, start = _segment(segments, number_of_segment)
    number = tl.arange(0, CLUSTERS)
    count = tl.zeros((CLUSTERS,), tl.int32)
    for part in range(parts):
        count += tl.load(counts + (index * parts + part) * CLUSTERS + number)
    count = tl.where(start >= 0, count, 0)
    pieces = (count + capacity - 1) // capacity
    n = tl.sum(tl.where(number == mine, count, 0), 0)
    before = tl.sum(tl.where(number < mine, count, 0), 0)
    slot = tl.sum(tl.where(number < mine, pieces, 0), 0)
    taken = tl.sum(pieces, 0)
    of_segment = index * segments.length
    if n > 0:
        _collect(owners + of_segment, mine, found.order + of_segment + before, start, segments.length, PLACES)
    parts_of_mine = (n + capacity - 1) // capacity
    out = index * found.slots + slot
    for piece in range(parts_of_mine):
        begin = (n.to(tl.int64) * piece // parts_of_mine).to(tl.int32)
        size = (n.to(tl.int64) * (piece + 1) // parts_of_mine).to(tl.int32) - begin
        tl.store(found.start + out + piece, number_of_segment * segments.length + before + begin)
        tl.store(found.size + out + piece, size)
    for empty in range(taken + mine, found.slots, clusters):
        tl.store(found.start + index * found.slots + empty, 0)
        tl.store(found.size + index * found.slots + empty, 0)
    if start < 0:
        for first in range(mine * PLACES, segments.length, clusters * PLACES):
            place = first + tl.arange(0, PLACES)
            tl.store(found.order + of_segment + place, tl.zeros((PLACES,), tl.int32), mask=place < segments.length)


@triton.jit
def piece_kernel(segments, found, D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr):
    """Mean and variances of the keys in slot ``program_id(0)``, counted through all segments; zeros in an empty one."""
    number_of_segment = tl.program_id(0) // found.slots
    index, keys, start = _segment(segments, number_of_segment)
    out = index * found.slots + tl.program_id(0) % found.slots
    size = tl.load(found.size + out)
    ordered = found.order + (index - number_of_segment) * segments.length + tl.load(found.start + out)
    dims = tl.arange(0, W)
    total = tl.zeros((W,), tl.float32)
    for first in range(0, size, KEYS):
        nth = first + tl.arange(0, KEYS)
        key = tl.load(ordered + nth, mask=nth < size, other=0) - start
        total += tl.sum(_keys(keys, segments, key, nth < size, D, W).to(tl.float32), 0)
    mean = total / tl.maximum(size, 1)
    squares = tl.zeros((W,), tl.float32)
    for first in range(0, size, KEYS):
        nth = first + tl.arange(0, KEYS)
        key = tl.load(ordered + nth, mask=nth < size, other=0) - start
        apart = _keys(keys, segments, key, nth < size, D, W).to(tl.float32) - mean[None, :]
        squares += tl.sum(tl.where((nth < size)[:, None], apart * apart, 0.0), 0)
    tl.store(found.centroids + out * D + dims, mean, mask=dims < D)
    tl.store(found.variances + out * D + dims, squares / tl.maximum(size, 1), mask=dims < D)


@triton.jit
def members_kernel(
    members, members_batch, members_head, order, start, size, first_number, slots, places, PLACES: tl.constexpr
):
    """``members[b, h, key] = first_number + slot`` for the keys ``order[start : start + size]`` of slot
    ``program_id(0)``; ``order [B, Hkv, places]``, ``start`` and ``size [B, Hkv, slots]``."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    of_head = batch * tl.num_programs(1) + head
    slot = tl.program_id(0)
    count = tl.load(size + of_head * slots + slot)
    begin = tl.load(start + of_head * slots + slot)
    here = members + batch * members_batch + head * members_head
    for first in range(0, count, PLACES):
        nth = first + tl.arange(0, PLACES)
        inside = nth < count
        key = tl.load(order + of_head * places + begin + nth, mask=inside, other=0)
        tl.store(here + key, tl.zeros((PLACES,), tl.int32) + (first_number + slot), mask=inside)
