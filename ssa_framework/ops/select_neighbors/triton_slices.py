"""Kernels that clip slices to their limit and group the queries by slice, so that a tile of them shares its keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Slices(NamedTuple):
    """``start, end [B, G, N, S, P]`` (``start`` is ``None``: each order is one slice) and ``order [B, G, S, L]``
    (``None``: the keys in position): pointers, and strides that are 0 along a broadcast axis."""

    start: Any
    end: Any
    batch: Any
    head: Any
    row: Any
    slot: Any
    order: Any
    order_batch: Any
    order_head: Any
    order_order: Any
    length: Any


class Clipped(NamedTuple):
    """The slices of all queries as the limit leaves them: ``spans`` int32 ``[H, N, S·P, 2]``, the first place and the
    number of places; ``offsets`` int32 ``[H, N, S·P]``, how many places the slices before it have together."""

    spans: Any
    offsets: Any


@triton.jit
def key_at(slices, batch, head, number, place, mask):
    """Keys at ``place`` of order ``number``; ``place``, ``number`` and ``mask`` broadcast; 0 where masked."""
    if slices.order is None:
        key = tl.where(mask, place, 0)
    else:
        start = slices.order + batch * slices.order_batch + head * slices.order_head
        key = tl.load(start + (number * slices.order_order + place), mask=mask, other=0)
    return key


@triton.jit
def clip_kernel(
    slices, positions, positions_batch, clipped, edges, first_head, graph_heads, rows, limit,
    CAUSAL: tl.constexpr, SLOTS: tl.constexpr, PER_ORDER: tl.constexpr, EDGES: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The slices of the queries as the limit leaves them, see `Clipped`.

    With ``EDGES``, ``edges [2, H, L + 1]`` gets +1 and -1 where the span of a query's slices (first to last place of
    all orders) begins and ends: the running sum of ``edges[1]`` counts the spans that hold a place, that of
    ``edges[0]`` the ones that hold both it and the place before.
    """
    head = tl.program_id(1).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.arange(0, PADDED)
    # [ROWS, PADDED]
    real = (row < rows)[:, None] & (slot < SLOTS)[None, :]
    number = (slot // PER_ORDER).to(tl.int64)[None, :]
    position = tl.load(positions + b * positions_batch + row, mask=row < rows, other=0)[:, None]
    if slices.start is None:
        start = tl.zeros((ROWS, PADDED), tl.int32)
        end = tl.where(real, start + slices.length, 0)
    else:
        at = b * slices.batch + g * slices.head + row[:, None] * slices.row + slot[None, :] * slices.slot
        start = tl.load(slices.start + at, mask=real, other=0)
        end = tl.load(slices.end + at, mask=real, other=0)
    low = start
    high = start if not CAUSAL else end
    if not CAUSAL:
        high = tl.where(end - start > limit, end, start)  # the others are taken whole
    while tl.max(tl.max(high - low, 1), 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        before = searching & (key_at(slices, b, g, number, middle, searching) <= position)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    if CAUSAL:
        end = low
        start = tl.maximum(start, end - limit)
    else:
        start = tl.minimum(tl.maximum(low - limit // 2, start), tl.maximum(end - limit, start))
        end = tl.minimum(start + limit, end)
    out = (head * rows + row)[:, None] * SLOTS + slot[None, :]
    length = tl.where(real, end - start, 0)
    tl.store(clipped.spans + 2 * out, start, mask=real)
    tl.store(clipped.spans + 2 * out + 1, length, mask=real)
    tl.store(clipped.offsets + out, tl.cumsum(length, 1) - length, mask=real)
    if EDGES:
        some = real & (end > start)
        # [ROWS]
        from_place = tl.min(tl.where(some, start, slices.length), 1)
        to_place = tl.max(tl.where(some, end, 0), 1)
        spans = to_place > from_place
        both = edges + head * (slices.length + 1)
        one = both + tl.num_programs(1).to(tl.int64) * (slices.length + 1)
        # +1 and -1 at the same place cancel: a span of one place joins it with no other
        tl.atomic_add(both + from_place + 1, 1, mask=spans, sem="relaxed")
        tl.atomic_add(both + to_place, -1, mask=spans, sem="relaxed")
        tl.atomic_add(one + from_place, 1, mask=spans, sem="relaxed")
        tl.atomic_add(one + to_place, -1, mask=spans, sem="relaxed")


@triton.jit
def count_kernel(
    spans, counts, first_row, rows, all_rows, length,
    SLOTS: tl.constexpr, PER_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many pairs (query, slice) begin at each place: ``counts [H, S, L + 1]``, shifted by one element."""
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < rows * SLOTS
    first = tl.load(spans + 2 * ((head * all_rows + first_row) * SLOTS + pair), mask=real, other=0)
    number = head * (SLOTS // PER_ORDER) + pair % SLOTS // PER_ORDER
    tl.atomic_add(counts + 1 + number * (length + 1) + first, 1, mask=real, sem="relaxed")


@triton.jit
def group_kernel(
    spans, cursors, pairs, first_row, rows, all_rows, length,
    SLOTS: tl.constexpr, PER_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``pairs [H, S, rows · P]``: the pairs ``row · P + slice`` of each order by the first place of their slice.

    ``cursors``: the running sum of what `count_kernel` counted. Pairs of one place come in any order; no score
    depends on which tile it is computed in.
    """
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < rows * SLOTS
    first = tl.load(spans + 2 * ((head * all_rows + first_row) * SLOTS + pair), mask=real, other=0)
    number = head * (SLOTS // PER_ORDER) + pair % SLOTS // PER_ORDER
    place = tl.atomic_add(cursors + number * (length + 1) + first, 1, mask=real, sem="relaxed")
    tl.store(pairs + place.to(tl.int64), (pair // SLOTS * PER_ORDER + pair % PER_ORDER).to(tl.int32), mask=real)
