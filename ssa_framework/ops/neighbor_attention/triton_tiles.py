"""What the kernels of this op share: how tensors and graphs are passed, which keys a query has, small products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import dot

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_LAST = tl.constexpr(2**31 - 1)


class Rows(NamedTuple):
    """A tensor ``[B, heads, length, dim]``: pointer and strides."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    dim: Any


class Fixed(NamedTuple):
    """Band and columns, and what is not theirs: masks and spans; pointers that are ``None`` are not there.

    ``before`` and ``after`` are -1 without a band. ``keep``: bool ``[B, M]``; ``query_segments`` ``[B, N]`` and
    ``key_segments`` ``[B, M]``; ``span_start`` and ``span_end`` ``[B, N]``, which share strides; each with its two
    strides (0 for an axis that is broadcast).
    """

    before: Any
    after: Any
    offset: Any
    columns: Any
    num_columns: Any
    keep: Any
    keep_batch: Any
    keep_key: Any
    query_segments: Any
    query_segments_batch: Any
    query_segments_row: Any
    key_segments: Any
    key_segments_batch: Any
    key_segments_key: Any
    span_start: Any
    span_end: Any
    span_batch: Any
    span_row: Any


class Lists(NamedTuple):
    """Neighbor lists ``[B, G, N, K]``: pointer (``None`` for no lists), strides (0 = broadcast) and K."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    slot: Any
    slots: Any


class Slices(NamedTuple):
    """Slices ``start, end [B, G, N, P]``, which share strides, of ``order [B, G, L]``: pointers (``None`` for no
    slices), strides (0 = broadcast), P and L."""

    start: Any
    end: Any
    batch: Any
    head: Any
    row: Any
    slot: Any
    slots: Any
    order: Any
    order_batch: Any
    order_head: Any
    order_place: Any
    length: Any


@triton.jit
def kept(fixed, batch, keys, row, in_range):
    """bool like ``keys``: not padding, nor in another document than query ``row``, nor in its span."""
    allowed = unmasked(fixed, batch, keys, row, in_range)
    if fixed.span_start is not None:
        at = batch * fixed.span_batch + row * fixed.span_row
        allowed = allowed & ((keys < tl.load(fixed.span_start + at)) | (keys >= tl.load(fixed.span_end + at)))
    return allowed


@triton.jit
def unmasked(fixed, batch, keys, row, in_range):
    """bool like ``keys``: not padding, nor in another document than query ``row``."""
    allowed = in_range
    if fixed.keep is not None:
        keep = tl.load(fixed.keep + batch * fixed.keep_batch + keys * fixed.keep_key, mask=in_range, other=0)
        allowed = allowed & (keep != 0)
    if fixed.query_segments is not None:
        of_query = tl.load(fixed.query_segments + batch * fixed.query_segments_batch + row * fixed.query_segments_row)
        of_keys = tl.load(
            fixed.key_segments + batch * fixed.key_segments_batch + keys * fixed.key_segments_key,
            mask=in_range,
            other=-1,
        )
        allowed = allowed & (of_keys == of_query)
    return allowed


@triton.jit
def kept_pairs(fixed, batch, keys, row, allowed):
    """``allowed [S, R]``, less what `kept` leaves out of ``keys [S]`` for queries ``row [R]``."""
    some_key = tl.max(allowed.to(tl.int32), 1) > 0
    some_row = tl.max(allowed.to(tl.int32), 0) > 0
    if fixed.span_start is not None:
        at = batch * fixed.span_batch + row * fixed.span_row
        start = tl.load(fixed.span_start + at, mask=some_row, other=0)
        end = tl.load(fixed.span_end + at, mask=some_row, other=0)
        allowed = allowed & ((keys[:, None] < start[None, :]) | (keys[:, None] >= end[None, :]))
    if fixed.keep is not None:
        keep = tl.load(fixed.keep + batch * fixed.keep_batch + keys * fixed.keep_key, mask=some_key, other=0)
        allowed = allowed & (keep != 0)[:, None]
    if fixed.query_segments is not None:
        of_queries = tl.load(
            fixed.query_segments + batch * fixed.query_segments_batch + row * fixed.query_segments_row,
            mask=some_row,
            other=-1,
        )
        of_keys = tl.load(
            fixed.key_segments + batch * fixed.key_segments_batch + keys * fixed.key_segments_key,
            mask=some_key,
            other=-1,
        )
        allowed = allowed & (of_keys[:, None] == of_queries[None, :])
    return allowed


@triton.jit
def band_of(fixed, position, num_keys):
    """First and last key of the band of the query at ``position``; first > last where there is none."""
    return tl.maximum(position - fixed.before, 0), tl.minimum(position + fixed.after, num_keys - 1)


@triton.jit
def fixed_keys(fixed, batch, row, position, first, last, slots, CAUSAL: tl.constexpr):
    """Keys of band and columns of the query ``row`` at ``position``, in this order: ``slots [S]`` → int32 ``[S]``, -1
    where a slot holds no edge."""
    width = tl.maximum(last - first + 1, 0)
    keys = first + slots
    valid = slots < width
    if fixed.columns is not None:
        column = slots - width
        is_column = (column >= 0) & (column < fixed.num_columns)
        columns = tl.load(fixed.columns + column, mask=is_column, other=-1)
        # those inside the band were counted there
        outside = (columns < first) | (columns > last)
        if CAUSAL:
            outside = outside & (columns <= position)
        keys = tl.where(is_column, columns, keys)
        valid = valid | (is_column & outside)
    valid = kept(fixed, batch, keys, row, valid)
    return tl.where(valid, keys, -1)


@triton.jit
def listed_keys(start, lists, first, SLOTS: tl.constexpr):
    """Keys in the ``SLOTS`` slots from ``first`` on, -1 before the first slot and past the last one."""
    slots = first + tl.arange(0, SLOTS)
    return tl.load(start + slots * lists.slot, mask=(slots >= 0) & (slots < lists.slots), other=-1)


@triton.jit
def _no_more_than(ascending, x, SIZE: tl.constexpr):
    """How many of ``ascending [SIZE]`` are no larger than each of ``x [S]``, ``SIZE - 1`` at most; by bisection, which
    keeps a number in each lane instead of all of them in every one."""
    count = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(9, -1, -1):
        if (1 << bit) < SIZE:
            probed = tl.gather(ascending, count + ((1 << bit) - 1), 0)
            count += tl.where(probed <= x, 1 << bit, 0)
    return count


@triton.jit
def first_columns(fixed):
    """The first 16 columns, int32 ``[16]``, ascending: read once for all `without_columns` of a query."""
    columns = tl.full((16,), _LAST, tl.int32)
    if fixed.columns is not None:
        index = tl.arange(0, 16)
        columns = tl.load(fixed.columns + index, mask=index < fixed.num_columns, other=_LAST)
    return columns


@triton.jit
def without_columns(fixed, columns, keys):
    """``keys [S]``, -1 for those that are columns; ``columns``: the `first_columns`, which are all as a rule."""
    if fixed.columns is not None:
        is_column = tl.gather(columns, _no_more_than(columns, keys - 1, 16), 0) == keys
        for start in range(16, fixed.num_columns, 16):
            index = start + tl.arange(0, 16)
            more = tl.load(fixed.columns + index, mask=index < fixed.num_columns, other=-1)
            is_column = is_column | (tl.max((keys[:, None] == more[None, :]).to(tl.int32), 1) > 0)
        keys = tl.where(is_column, -1, keys)
    return keys


@triton.jit
def slices_of(slices, batch, head, row, PADDED: tl.constexpr):
    """Where the keys of a query's slices are, when these stand one behind the other: ``[PADDED]`` each, one past the
    last slot of every slice and its distance from the order; and how many slots there are."""
    slot = tl.arange(0, PADDED)
    at = batch * slices.batch + head * slices.head + row.to(tl.int64) * slices.row + slot * slices.slot
    start = tl.load(slices.start + at, mask=slot < slices.slots, other=0)
    size = tl.maximum(tl.load(slices.end + at, mask=slot < slices.slots, other=0) - start, 0)
    after = tl.cumsum(size, 0)
    return after, start - (after - size), tl.sum(size, 0)


@triton.jit
def sliced_keys(
    order, slices, fixed, columns, batch, row, position, after, shift, sliced, slots, num_keys,
    SLICES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Keys in ``slots [S]`` of a query's slices, of which `slices_of` gives ``after``, ``shift`` and ``sliced``; -1 =
    none, or what another part has. ``columns``: the `first_columns`."""
    inside = (slots >= 0) & (slots < sliced)
    place = slots + tl.gather(shift, _no_more_than(after, slots, SLICES), 0)
    keys = without_columns(fixed, columns, tl.load(order + place * slices.order_place, mask=inside, other=-1))
    first, last = band_of(fixed, position, num_keys)
    allowed = (keys >= 0) & ((keys < first) | (keys > last))
    if CAUSAL:
        allowed = allowed & (keys <= position)
    return tl.where(kept(fixed, batch, keys, row, allowed), keys, -1)


@triton.jit
def load_heads(rows, batch, head, row, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """The rows of ``HEADS`` heads, of width ``D`` padded to ``W``: ``[W, PADDED]``, or ``[1, W]`` for one head."""
    start = rows.pointer + batch * rows.batch + head * rows.head + row * rows.row
    dims = tl.arange(0, W)
    if PADDED == 1:
        tile = tl.load(start + dims[None, :] * rows.dim, mask=dims[None, :] < D, other=0.0)
    else:
        heads = tl.arange(0, PADDED).to(tl.int64)
        inside = (dims[:, None] < D) & (heads[None, :] < HEADS)
        tile = tl.load(start + heads[None, :] * rows.head + dims[:, None] * rows.dim, mask=inside, other=0.0)
    return tile


@triton.jit
def gather(start, keys, rows, ROW: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Rows ``keys [S]`` of one head's keys or values: ``[S, W]``, zeros where a key is -1.

    ``ROW`` is their distance: as a constant, an address takes one instruction instead of seven.
    """
    dims = tl.arange(0, W)
    inside = (keys >= 0)[:, None]
    if D != W:
        inside = inside & (dims < D)[None, :]
    # a thread's place within a row does not depend on the row
    return tl.load((start + dims * rows.dim)[None, :] + keys[:, None].to(tl.int64) * ROW, mask=inside, other=0.0)


@triton.jit
def rows_of(start, rows, row, head, ROW: tl.constexpr, D: tl.constexpr, W: tl.constexpr, OFFSET: tl.constexpr):
    """Rows ``row [R]`` of heads ``head [R]`` after ``start``: ``[R, W]``, zeros where ``head`` is -1."""
    dims = tl.arange(0, W)
    inside = (head >= 0)[:, None]
    if D != W:
        inside = inside & (dims < D)[None, :]
    at = (head.to(OFFSET) * rows.head + row.to(OFFSET) * ROW)[:, None]
    return tl.load((start + dims * rows.dim)[None, :] + at, mask=inside, other=0.0)


@triton.jit
def products(tile, x, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """``tile [S, W]`` by ``x`` (as `load_heads` gives it) → ``[S, PADDED]``."""
    if PADDED == 1:  # one row can't fill a matrix unit
        result = tl.sum(tile.to(tl.float32) * x.to(tl.float32), 1, keep_dims=True)
    else:
        result = dot(tile, x, tl.zeros((tile.shape[0], PADDED), tl.float32), PRECISION)
    return result


@triton.jit
def weighted_sum(tile, weights, acc, PADDED: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus the rows of ``tile [S, W]``, weighted by ``weights [S, PADDED]``; ``acc`` has the shape of ``x``."""
    if FP32:
        tile = tile.to(tl.float32)
    if PADDED == 1:
        acc += tl.sum(tile.to(tl.float32) * weights, 0, keep_dims=True)
    else:
        acc = dot(tl.trans(tile), weights.to(tile.dtype), acc, PRECISION)
    return acc
