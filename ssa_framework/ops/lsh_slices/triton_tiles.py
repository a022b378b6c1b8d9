"""What the hashing kernels share: loads of rows and levels, projections in float32 accuracy, running means, slices."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.triton_runtime import dot


class Rows(NamedTuple):
    """``[B, H, N, D]``: a pointer and the strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Keys(NamedTuple):
    """What holds for keys: pointers and batch strides, 0 along a broadcast axis.

    Attributes:
        first, last: int32 ``[B or 1, M]``; see `HashLevels`.
        keep: uint8 ``[B or 1, M]`` or ``None``.
        counts: float32 ``[B or 1, M]``, kept keys up to each (of all, if not causal), or ``None``.
        places: int32 ``[B or 1, M]``, the keys document by document, or ``None`` = in position.
        documents: int32 ``[B or 1, M]`` or ``None``.
        keys: M.
    """

    first: Any
    first_batch: Any
    last: Any
    last_batch: Any
    keep: Any
    keep_batch: Any
    counts: Any
    counts_batch: Any
    places: Any
    places_batch: Any
    documents: Any
    documents_batch: Any
    keys: Any


class Queries(NamedTuple):
    """``levels`` and ``documents`` (or ``None``), int32 ``[B or 1, N]``: pointers and batch strides; N."""

    levels: Any
    levels_batch: Any
    documents: Any
    documents_batch: Any
    queries: Any


class Slices(NamedTuple):
    """Where slices are looked up and written.

    Attributes:
        firsts: int32 ``[B·Hkv·S, buckets]``, where each bucket starts. order: int32 ``[B·Hkv·S, L]``.
        start, end: int32 ``[B, G, N, S, P]``, contiguous.
        length: L. buckets, functions, count: numbers of buckets, S, P. group: G / Hkv.
    """

    firsts: Any
    order: Any
    start: Any
    end: Any
    length: Any
    buckets: Any
    functions: Any
    count: Any
    group: Any


@triton.jit
def load_rows(x, b, h, row, rows, keep, keep_batch, D: tl.constexpr, WIDTH: tl.constexpr):
    """``x[b, h, row]`` ``[R, WIDTH]``, zeros beyond the last row, beyond D and where not kept."""
    real = row < rows
    if keep is not None:
        real = real & (tl.load(keep + b * keep_batch + row, mask=real, other=0) != 0)
    column = tl.arange(0, WIDTH)
    at = x.data + b * x.batch + h * x.head + row[:, None] * x.row + column[None, :] * x.column
    return tl.load(at, mask=real[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def key_levels(keys, b, index, most):
    """The keys at ``index`` of the order by document, and their first and last numbers of bits; first > last = none."""
    real = index < keys.keys
    key = index
    if keys.places is not None:
        key = tl.load(keys.places + b * keys.places_batch + index, mask=real, other=0)
    first = tl.load(keys.first + b * keys.first_batch + key, mask=real, other=1)
    last = tl.load(keys.last + b * keys.last_batch + key, mask=real, other=0)
    return key, tl.maximum(first, 0), tl.minimum(last, most)


@triton.jit
def load_part(parts, part, column, TOTAL: tl.constexpr, WIDTH: tl.constexpr):
    """One part of some directions, ``[WIDTH, C]``; ``parts [PARTS, WIDTH, TOTAL]``."""
    d = tl.arange(0, WIDTH)
    return tl.load(parts + part * WIDTH * TOTAL + d[:, None] * TOTAL + column[None, :])


@triton.jit
def project(x, high, middle, low, PARTS: tl.constexpr):
    """``x [R, WIDTH] @ directions [WIDTH, C]`` in float32.

    bfloat16 rows meet directions split in three parts, small ones first: every product is exact. Others are float32.
    """
    acc = tl.zeros((x.shape[0], high.shape[1]), tl.float32)
    if PARTS == 3:
        acc = dot(x, low, acc, "ieee")
        acc = dot(x, middle, acc, "ieee")
        acc = dot(x, high, acc, "ieee")
    else:
        acc = dot(x.to(tl.float32), high, acc, "tf32x3")
    return acc


@triton.jit
def subtract_mean(
    projected, carry, keys, b, h, heads, tile, tiles, column, row, CAUSAL: tl.constexpr, TOTAL: tl.constexpr
):
    """``projected [R, C]`` less that of the mean: the projection of a mean is the mean of the projections.

    ``carry [B·Hkv, tiles or 1, TOTAL]``: of the sum of all rows before the tile, or of all rows.
    """
    number = tile if CAUSAL else 0
    stride = tiles if CAUSAL else 1
    sums = tl.load(carry + ((b * heads + h) * stride + number) * TOTAL + column)[None, :]
    if CAUSAL:
        sums += tl.cumsum(projected, 0)
    if keys.counts is not None:
        count = tl.load(keys.counts + b * keys.counts_batch + row, mask=row < keys.keys, other=1.0)
    elif CAUSAL:
        count = (row + 1).to(tl.float32)
    else:
        count = tl.zeros(row.shape, tl.float32) + keys.keys
    return projected - sums / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _first_of_document(slices, keys, b, segment, low, high, document):
    """First place in ``[low, high)`` whose key belongs to ``document`` or a later one; all ``[R, F, P]``."""
    while tl.max(tl.max(tl.max(high - low, 2), 1), 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        key = tl.load(slices.order + segment * slices.length + middle, mask=searching, other=0)
        here = tl.load(keys.documents + b * keys.documents_batch + key, mask=searching, other=0)
        before = searching & (here < document)
        low = tl.where(before, middle + 1, low)
        high = tl.where(searching & (here >= document), middle, high)
    return low


@triton.jit
def store_slices(code, bits, row, function, slices, queries, keys, b, g, graph_heads, P: tl.constexpr):
    """The bounds of the buckets that queries look into.

    Args:
        code: int32 ``[R, F, P]``, -1 = no more. bits, row: ``[R]``. function: ``[F]``.
    """
    p = tl.arange(0, P)
    real = (row < queries.queries)[:, None, None] & (function < slices.functions)[None, :, None]
    real = real & (p < slices.count)[None, None, :]
    levels = bits[:, None, None]
    code = tl.where(levels == 0, 0, code)
    known = real & (code >= 0) & (levels >= 0)
    document = row[:, None, None]
    if queries.documents is not None:
        document = tl.load(queries.documents + b * queries.documents_batch + row, mask=row < queries.queries, other=-1)
        document = document[:, None, None]
        known = known & (document >= 0)
    kv_heads = graph_heads // slices.group
    segment = ((b * kv_heads + g // slices.group) * slices.functions + function)[None, :, None]
    bucket = slices.firsts + segment * slices.buckets + ((1 << tl.maximum(levels, 0)) - 1 + code)
    low = tl.load(bucket, mask=known, other=0)
    high = tl.load(bucket + 1, mask=known, other=0)
    if queries.documents is not None:
        start = _first_of_document(slices, keys, b, segment, low, high, document)
        high = _first_of_document(slices, keys, b, segment, start, high, document + 1)
        low = start
    # every key of the document, dealt out evenly
    slots = slices.functions * slices.count
    width = tl.where(levels == 0, (high - low + slots - 1) // slots, 0)
    part = function[None, :, None] * slices.count + p[None, None, :]
    low, high = (
        tl.where(levels == 0, tl.minimum(low + part * width, high), low),
        tl.where(levels == 0, tl.minimum(low + (part + 1) * width, high), high),
    )
    at = (b * graph_heads + g) * queries.queries + row[:, None, None]
    at = (at * slices.functions + function[None, :, None]) * slices.count + p[None, None, :]
    tl.store(slices.start + at, low, mask=real)
    tl.store(slices.end + at, high, mask=real)
