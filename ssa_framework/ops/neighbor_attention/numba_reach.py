"""Which queries reach which tile: the tiles of spans, of slices and of summaries, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssa_framework.ops.neighbor_attention.numba_rows import Array, Tables, span_of
from ssa_framework.ops.neighbor_attention.numba_tiles import TILE, Parts, Tile, hide_padding, load_strip, may_hide, pick
from ssa_framework.ops.numba_runtime import device_function

ROWS_AT_ONCE = 512
"""Queries that go through the tiles of spans and summaries together: more would reach more tiles in part only."""


class Order(NamedTuple):
    """Slices of a block of queries, in the order in which they are taken."""

    bins: Array  # int32 [L + 2], for sorting
    rows: Array  # int32 [R · P], queries
    starts: Array  # int32 [R · P], places
    ends: Array


@device_function
def span_extent(parts: Parts, batch: int, start: int, stop: int) -> tuple[int, int]:
    """First and one past the last key of the spans of the queries ``start .. stop``."""
    first, end = parts.shape.keys, 0
    for row in range(start, stop):
        low, high = span_of(parts.graph, batch, row)
        if low < high:
            first, end = min(first, low), max(end, high)
    return first, end


@device_function
def load_span_tile(
    x: Tables, parts: Parts, batch: int, kv_head: int, start: int, stop: int, first: int, tile: Tile
) -> int:
    """The keys from ``first`` on and the queries of ``start .. stop`` whose span has some; returns how many."""
    shape, count = parts.shape, 0
    size, documents = min(TILE, shape.keys - first), parts.graph.query_segments.shape[0] > 0
    for row in range(start, stop):
        tile.hidden[count] = documents
        low, high = span_of(parts.graph, batch, row)
        low, high = max(low - first, 0), min(high - first, size)
        tile.rows[count], tile.low[count], tile.high[count] = row, low, high
        count += low < high
    if count:
        for t in range(TILE):
            tile.keys[t] = min(first + t, shape.keys - 1)
        hide_padding(parts, batch, size, tile)
        table = (batch * shape.kv_heads + kv_head) * shape.keys
        load_strip(x.k, table * shape.width, shape.width, tile.keys, size, tile.strip)
    return count


@device_function
def load_summary_tile(
    parts: Parts, batch: int, kv_head: int, start: int, stop: int, level: int, first: int, tile: Tile
) -> int:
    """The summaries from ``first`` on and the queries of ``start .. stop`` that see some of a level; returns how many.

    A tile that holds summaries of two levels is loaded for each.
    """
    shape, summaries, count = parts.shape, parts.summaries, 0
    total = summaries.log_weight.shape[1]
    size = min(TILE, total - first)
    element = pick(summaries.first.shape[0], batch)
    for row in range(start, stop):
        low = max(summaries.first[element, row, level] - first, 0)
        high = min(summaries.stop[element, row, level] - first, size)
        tile.rows[count], tile.low[count], tile.high[count] = row, low, high
        count += low < high
    if count:
        table = batch * shape.kv_heads + kv_head
        for t in range(TILE):
            tile.keys[t] = min(first + t, total - 1)
            tile.added[t] = summaries.log_weight[table, tile.keys[t]]
        load_strip(summaries.k, table * total * shape.width, shape.width, tile.keys, size, tile.strip)
    return count


@device_function
def pick_head(count: int, head: int, heads: int) -> int:
    """The place of a query head on an axis of one for all, one per KV head or one per query head."""
    return head * count // heads


@device_function
def slices_of(parts: Parts, batch: int, head: int) -> tuple[Array, Array]:
    """Starts and ends of the slices of a query head, int32 ``[N, P]``."""
    slices = parts.slices
    element, member = pick(slices.start.shape[0], batch), pick_head(slices.start.shape[1], head, parts.shape.heads)
    return slices.start[element, member], slices.end[element, member]


@device_function
def shared_heads(parts: Parts) -> int:
    """How many query heads go by the same slices: the KV group, or each by its own."""
    heads = max(parts.slices.order.shape[1], parts.slices.start.shape[1])
    return parts.shape.heads // parts.shape.kv_heads if heads <= parts.shape.kv_heads else 1


@device_function
def sort_slices(parts: Parts, batch: int, head: int, start: int, stop: int, order: Order) -> int:
    """Sort the slices of the queries ``start .. stop`` that have keys, by first place, then by query: how many.

    A counting sort by the high bits of the place, as many bins as there are slices or more, and an insertion sort,
    where few are out of order or none.
    """
    first, last = slices_of(parts, batch, head)
    bins, each, length, shift = order.bins, first.shape[1], parts.slices.order.shape[2], 0
    while (length >> shift) > 4 * (stop - start) * each + 64:
        shift += 1
    used = (length >> shift) + 2
    bins[:used] = 0
    for row in range(start, stop):
        for p in range(each):
            bins[(first[row, p] >> shift) + 1] += last[row, p] > first[row, p]
    for i in range(1, used):
        bins[i] += bins[i - 1]
    count = int(bins[used - 1])
    for row in range(start, stop):
        for p in range(each):
            if last[row, p] > first[row, p]:
                place = bins[first[row, p] >> shift]
                order.rows[place], order.starts[place], order.ends[place] = row, first[row, p], last[row, p]
                bins[first[row, p] >> shift] += 1
    if shift:
        for i in range(1, count):
            row, mine, end, j = order.rows[i], order.starts[i], order.ends[i], i
            while j and order.starts[j - 1] > mine:
                order.rows[j], order.starts[j], order.ends[j] = (
                    order.rows[j - 1],
                    order.starts[j - 1],
                    order.ends[j - 1],
                )
                j -= 1
            order.rows[j], order.starts[j], order.ends[j] = row, mine, end
    return count


@device_function
def same_start(order: Order, place: int, count: int) -> tuple[int, int]:
    """One past the last of the sorted slices that start where slice ``place`` does, and their largest end."""
    begin, end = order.starts[place], 0
    while place < count and order.starts[place] == begin:
        end = max(end, order.ends[place])
        place += 1
    return place, end


@device_function
def load_slice_tile(
    x: Tables, parts: Parts, batch: int, kv_head: int, head: int, order: Order, at: int, after: int, first: int,
    tile: Tile,
) -> int:  # fmt: skip
    """The keys from place ``first`` of the order on, and those of the sorted slices ``at .. after`` that reach them.

    These slices start alike. Returns how many reach the tile.
    """
    shape, slices, count, size = parts.shape, parts.slices, 0, 0
    for i in range(at, after):
        high = min(order.ends[i] - first, TILE)
        tile.rows[count], tile.low[count], tile.high[count] = order.rows[i], 0, high
        count += high > 0
        size = max(size, high)
    if count:
        keys = slices.order[pick(slices.order.shape[0], batch), pick_head(slices.order.shape[1], head, shape.heads)]
        low, high = shape.keys, -1
        for t in range(TILE):
            key = keys[first + min(t, size - 1)]
            tile.keys[t] = key
            low, high = min(low, key), max(high, key)
        for e in range(count):
            tile.hidden[e] = may_hide(parts, batch, tile.rows[e], low, high)
        hide_padding(parts, batch, size, tile)
        if slices.is_column.shape[0]:
            for t in range(size):
                if slices.is_column[tile.keys[t]]:
                    tile.added[t] = -np.inf
        table = (batch * shape.kv_heads + kv_head) * shape.keys
        load_strip(x.k, table * shape.width, shape.width, tile.keys, size, tile.strip)
    return count
