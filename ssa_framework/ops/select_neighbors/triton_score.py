"""The scoring kernel: tiles of queries whose slices begin close together, against the keys of those slices."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.select_neighbors.triton_slices import key_at
from ssa_framework.ops.triton_runtime import dot

_OUTSIDE = tl.constexpr(0x7FFFFFFF)
_INCOMPARABLE = tl.constexpr(-3.4028234663852886e38)


class Rows(NamedTuple):
    """A tensor ``[B, heads, length, dim]``: pointer and strides."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    dim: Any


class Pairs(NamedTuple):
    """``grouped [H, S, rows · P]``: pairs (query, slice) of the ``rows`` queries from ``first_row`` of ``all_rows``."""

    grouped: Any
    first_row: Any
    rows: Any
    all_rows: Any


class Allowed(NamedTuple):
    """Which keys may be listed; pointers that are ``None`` restrict nothing.

    ``open_keys``: uint8 ``[B or 1, M]``. The segments ``[B or 1, N]`` and ``[B or 1, M]``. Each with its stride along
    the batch. Keys from ``before`` before to ``after`` after a query's position belong to the band.
    """

    positions: Any
    positions_batch: Any
    open_keys: Any
    open_keys_batch: Any
    query_segments: Any
    query_segments_batch: Any
    key_segments: Any
    key_segments_batch: Any
    before: Any
    after: Any


@triton.jit
def _spans(clipped, slot, real):
    """First places and lengths ``[QUERIES]`` of slices. Loaded in pairs: a narrow load would be repeated by every
    warp, in the layout of the products."""
    pairs = tl.load(clipped.spans + 2 * slot[:, None] + tl.arange(0, 2)[None, :], mask=real[:, None], other=0)
    return tl.split(pairs)


@triton.jit
def _step(
    slices, places, batch, graph_head, line, number, start, SLOTS: tl.constexpr, KEYS: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """Keys and table entries ``[KEYS]`` from place ``start`` on; loaded one step ahead of their use."""
    place = start + tl.arange(0, KEYS)
    in_order = place < slices.length
    key = key_at(slices, batch, graph_head, number, place, in_order).to(tl.int32)
    entry = key
    if SLOTS > 1 and not SEARCH:
        entry = tl.load(places.entries + line * slices.length + place, mask=in_order, other=0)
    return key, entry


@triton.jit
def _holds(slices, batch, head, number, first, length, key):
    """bool ``[QUERIES, KEYS]``: whether the slices ``[QUERIES, 1]`` of an order hold ``key [1, KEYS]``; by search."""
    low = first + tl.zeros_like(key)
    end = low + length
    high = end
    while tl.max(tl.max(high - low, 1), 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        before = searching & (key_at(slices, batch, head, number, middle, searching) < key)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return (low < end) & (key_at(slices, batch, head, number, low, low < end) == key)


@triton.jit
def _without(x, there, first, length):
    """``x [QUERIES, KEYS]``, -inf where ``there [KEYS]`` lies in a slice that begins at ``first [QUERIES]``."""
    apart = (there[None, :] - first[:, None]).to(tl.uint32)
    return tl.where(apart < length[:, None].to(tl.uint32), -float("inf"), x)


@triton.jit
def _score_tile(
    q, k, pairs, slices, clipped, places, allowed, scores, tile_number, number, head, batch, graph_head,
    KV_SHARE: tl.constexpr, ORDERS: tl.constexpr, PER_ORDER: tl.constexpr, ROOM: tl.constexpr, BAND: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """Scores of tile ``tile_number`` of order ``number``."""
    SLOTS: tl.constexpr = ORDERS * PER_ORDER
    # [QUERIES]
    at = tile_number * QUERIES + tl.arange(0, QUERIES)
    real = at < pairs.rows * PER_ORDER
    pair = tl.load(pairs.grouped + (head * ORDERS + number) * pairs.rows * PER_ORDER + at, mask=real, other=0)
    local = (pair // PER_ORDER).to(tl.int64)
    which = pair % PER_ORDER
    row = pairs.first_row + local
    of_row = (head * pairs.all_rows + row) * SLOTS
    own = number * PER_ORDER + which
    first, length = _spans(clipped, of_row + own, real)
    offset = tl.load(clipped.offsets + of_row + own, mask=real, other=0)
    # 32 bits reach all scores of a chunk
    out = (local.to(tl.int32) + head.to(tl.int32) * pairs.rows) * ROOM + offset - first
    dims = tl.arange(0, WIDTH)
    # [QUERIES, WIDTH]
    inside_tile = real[:, None] & (dims < D)[None, :]
    q_start = q.pointer + batch * q.batch + graph_head * q.head
    tile = tl.load(q_start + row[:, None] * q.row + dims[None, :] * q.dim, mask=inside_tile, other=0.0)
    if BAND:
        position = tl.load(allowed.positions + batch * allowed.positions_batch + row, mask=real, other=0)
    if allowed.query_segments is not None:
        of_query = tl.load(allowed.query_segments + batch * allowed.query_segments_batch + row, mask=real, other=0)
    k_start = k.pointer + batch * k.batch + graph_head // KV_SHARE * k.head
    # where few slices can be earlier, all of them stay in registers
    FEW: tl.constexpr = SLOTS > 1 and SLOTS <= 4 and not SEARCH
    if FEW:
        first_0, length_0 = _spans(clipped, of_row, real & (own > 0))
        first_1, length_1 = _spans(clipped, of_row + 1, real & (own > 1))
        first_2, length_2 = _spans(clipped, of_row + 2, real & (own > 2))
    start = tl.min(tl.where(length > 0, first, slices.length), 0)
    key, entry = _step(slices, places, batch, graph_head, head * ORDERS + number, number, start, SLOTS, KEYS, SEARCH)
    while start < slices.length:
        # [KEYS]
        place = start + tl.arange(0, KEYS)
        after = start + KEYS
        start = tl.min(tl.where(first + length > after, tl.maximum(first, after), slices.length), 0)
        next_key, next_entry = _step(
            slices, places, batch, graph_head, head * ORDERS + number, number, start, SLOTS, KEYS, SEARCH
        )
        # [KEYS, WIDTH]; a key beyond the order is key 0
        key_start = k_start + key.to(tl.int64)[:, None] * k.row + dims[None, :] * k.dim
        key_tile = tl.load(key_start, mask=(dims < D)[None, :], other=0.0)
        # [QUERIES, KEYS]
        x = dot(tile, tl.trans(key_tile), tl.zeros((QUERIES, KEYS), tl.float32), PRECISION)
        # -inf is a key that is not to be listed; the lowest finite number, one whose score compares with nothing
        x = tl.maximum(x, _INCOMPARABLE)
        inside = (place[None, :] - first[:, None]).to(tl.uint32) < length[:, None].to(tl.uint32)
        x = tl.where(inside, x, -float("inf"))
        if BAND:
            apart = (key[None, :] - position[:, None] + allowed.before).to(tl.uint32)
            x = tl.where(apart <= allowed.before + allowed.after, -float("inf"), x)
        if allowed.open_keys is not None:
            open_key = tl.load(allowed.open_keys + batch * allowed.open_keys_batch + key)
            x = tl.where((open_key != 0)[None, :], x, -float("inf"))
        if allowed.query_segments is not None:
            of_key = tl.load(allowed.key_segments + batch * allowed.key_segments_batch + key)
            x = tl.where(of_key[None, :] == of_query[:, None], x, -float("inf"))
        if SEARCH:
            for slot in range((number + 1) * PER_ORDER):
                other_first, other_length = _spans(clipped, of_row + slot, real)
                other_length = tl.where(slot < own, other_length, 0)
                found = _holds(
                    slices, batch, graph_head, slot // PER_ORDER, other_first[:, None], other_length[:, None],
                    key[None, :],
                )  # fmt: skip
                x = tl.where(found, -float("inf"), x)
        elif FEW:
            # [KEYS]
            line = places.table + entry.to(tl.int64)[:, None] * ((ORDERS + 1) // 2 * 2) + tl.arange(0, 2)[None, :]
            there_0, there_1 = tl.split(tl.load(line))
            there_2 = there_0
            if ORDERS > 2:
                there_2, _ = tl.split(tl.load(line + 2))
            earlier = number * PER_ORDER + PER_ORDER - 1  # than some slice of this order
            if earlier > 0:
                x = _without(x, there_0, first_0, length_0)
            if earlier > 1:
                x = _without(x, there_1 if PER_ORDER == 1 else there_0, first_1, length_1)
            if earlier > 2:
                last = there_2 if PER_ORDER == 1 else there_1 if PER_ORDER == 2 else there_0
                x = _without(x, last, first_2, length_2)
        elif SLOTS > 1:
            line = places.table + entry.to(tl.int64)[:, None] * ((ORDERS + 1) // 2 * 2) + tl.arange(0, 2)[None, :]
            for two in range(0, number + (1 if PER_ORDER > 1 else 0), 2):
                # [KEYS]
                even, odd = tl.split(tl.load(line + two))
                for half in tl.static_range(2):
                    there = even if half == 0 else odd
                    for sibling in tl.static_range(PER_ORDER):
                        other = (two + half) * PER_ORDER + sibling
                        other_first, other_length = _spans(clipped, of_row + other, real & (own > other))
                        x = _without(x, there, other_first, other_length)
        # Outside the slices stands a NaN of its own: as a mask, it needs no row of numbers in the layout of the store.
        bits = tl.where(inside, x.to(tl.int32, bitcast=True), _OUTSIDE)
        tl.store(scores + (out[:, None] + place[None, :]), bits.to(tl.float32, bitcast=True), mask=bits != _OUTSIDE)
        key, entry = next_key, next_entry


@triton.jit
def score_kernel(
    q, k, pairs, slices, clipped, places, allowed, scores, first_head, graph_heads,
    KV_SHARE: tl.constexpr, ORDERS: tl.constexpr, PER_ORDER: tl.constexpr, ROOM: tl.constexpr, BAND: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scores [H, rows, ROOM]``: for each query the products with the keys of its slices, one slice after the other;
    -inf where the key may not be listed, or an earlier slice of the query holds it. Does nothing where the table of
    places is broken.
    """
    usable = tl.full((), 1, tl.int1)
    if ORDERS * PER_ORDER > 1:
        usable = tl.load(places.broken) == 0
    if usable:
        number = tl.program_id(1).to(tl.int64)
        head = tl.program_id(2).to(tl.int64)
        _score_tile(
            q, k, pairs, slices, clipped, places, allowed, scores, tl.program_id(0), number, head,
            (first_head + head) // graph_heads, (first_head + head) % graph_heads,
            KV_SHARE, ORDERS, PER_ORDER, ROOM, BAND, D, WIDTH, QUERIES, KEYS, PRECISION, False,
        )  # fmt: skip


@triton.jit
def search_kernel(
    q, k, pairs, slices, clipped, places, allowed, scores, first_head, graph_heads, heads,
    KV_SHARE: tl.constexpr, ORDERS: tl.constexpr, PER_ORDER: tl.constexpr, ROOM: tl.constexpr, BAND: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `score_kernel` does, where the table of places is broken: each program takes many tiles."""
    if tl.load(places.broken) != 0:
        tiles = tl.cdiv(pairs.rows * PER_ORDER, QUERIES)
        for i in range(tl.program_id(0).to(tl.int64), tiles * ORDERS * heads, tl.num_programs(0)):
            head = i // (tiles * ORDERS)
            _score_tile(
                q, k, pairs, slices, clipped, places, allowed, scores, i % tiles, i // tiles % ORDERS, head,
                (first_head + head) // graph_heads, (first_head + head) % graph_heads,
                KV_SHARE, ORDERS, PER_ORDER, ROOM, BAND, D, WIDTH, QUERIES, KEYS, PRECISION, True,
            )  # fmt: skip
