"""The backward kernel of spans, slices and summaries, tile by tile: gradients of queries, keys and values in one pass.

A task goes through its queries in order and adds to gradients that it alone owns, so each weight is computed again
only once. With a tile of keys K, V and a chunk of queries Q with gradients dO, it takes five products: Q·Kᵀ, dO·Vᵀ,
dS·K, dSᵀ·Q and Pᵀ·dO.
"""

from __future__ import annotations

from typing import NamedTuple

from ssa_framework.ops.neighbor_attention.numba_reach import (
    ROWS_AT_ONCE,
    Order,
    load_slice_tile,
    load_span_tile,
    load_summary_tile,
    same_start,
    shared_heads,
    sort_slices,
    span_extent,
)
from ssa_framework.ops.neighbor_attention.numba_rows import Array, Shape, Tables, row_delta
from ssa_framework.ops.neighbor_attention.numba_tiles import (
    SLICES,
    SPANS,
    SUMMARIES,
    TILE,
    Parts,
    Tile,
    drop,
    first_opened,
    hide_keys,
    hide_opened,
    load_strip,
    scale_scores,
)
from ssa_framework.ops.numba_products import add_four_sums, rows_by_matrix
from ssa_framework.ops.numba_runtime import bare_kernel, device_function, inlined_function
from ssa_framework.ops.numba_vectors import exp, lanes, load, mul, splat, store, sub

CHUNK = 64
"""Queries whose weights are kept until they have been added to the gradients of the keys."""


class Gradients(NamedTuple):
    """What comes in, per query, and what is added to, all like the tables."""

    out: Array
    lse: Array  # +inf for queries without neighbors, whose weights are 0 so
    delta: Array
    q: Array
    k: Array
    v: Array
    summary_k: Array
    summary_v: Array


class Keys(NamedTuple):
    """Keys and values, or those of summaries, and their gradients; ``first`` is the first row of a KV head."""

    k: Array
    v: Array
    grad_k: Array
    grad_v: Array
    first: int


@bare_kernel
def row_deltas(
    shape: Shape, out: Array, grad_out: Array, grad_lse: Array, lse: Array, start: int, stop: int, delta: Array
) -> None:
    """``delta = out · grad_out - grad_lse`` of some queries of all heads."""
    for line in range(start, stop):
        delta[line] = row_delta(shape, out, grad_out, grad_lse, lse, line)


@bare_kernel
def tile_gradients(
    x: Tables, parts: Parts, batch: int, kv_head: int, start: int, stop: int, tile: Tile, order: Order,
    grads: Gradients,
) -> None:  # fmt: skip
    """Add what the queries ``start .. stop`` of a KV group give through spans, slices and summaries to ``grads``."""
    shape, summaries = parts.shape, parts.summaries
    group = shape.heads // shape.kv_heads
    table = batch * shape.kv_heads + kv_head
    keys = Keys(x.k, x.v, grads.k, grads.v, table * shape.keys)
    total = summaries.log_weight.shape[1]
    pseudo = Keys(summaries.k, summaries.v, grads.summary_k, grads.summary_v, table * total)
    tile.factors[:] = 1
    for first in range(start, stop, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, stop)
        low, high = span_extent(parts, batch, first, last)
        for place in range(low // TILE * TILE, high, TILE):
            count = load_span_tile(x, parts, batch, kv_head, first, last, place, tile)
            _add_tile(SPANS, x.q, keys, parts, batch, kv_head * group, group, count, tile, grads)
        for place in range(0, total, TILE):
            for level in range(summaries.first.shape[2]):
                count = load_summary_tile(parts, batch, kv_head, first, last, level, place, tile)
                _add_tile(SUMMARIES, x.q, pseudo, parts, batch, kv_head * group, group, count, tile, grads)
    if parts.slices.start.shape[0]:
        step = shared_heads(parts)
        for head in range(kv_head * group, (kv_head + 1) * group, step):
            slices, at = sort_slices(parts, batch, head, start, stop, order), 0
            while at < slices:
                after, end = same_start(order, at, slices)
                for place in range(order.starts[at], end, TILE):
                    count = load_slice_tile(x, parts, batch, kv_head, head, order, at, after, place, tile)
                    _add_tile(SLICES, x.q, keys, parts, batch, head, step, count, tile, grads)
                at = after


@device_function
def _add_tile(
    kind: int, q: Array, keys: Keys, parts: Parts, batch: int, head: int, heads: int, count: int, tile: Tile,
    grads: Gradients,
) -> None:  # fmt: skip
    """Add what ``count`` queries of each of some heads give through a tile."""
    shape, size = parts.shape, 0
    for e in range(count):
        size = max(size, tile.high[e])
    first = keys.first * shape.value_width
    load_strip(keys.v, first, shape.value_width, tile.keys, size, tile.value_strip)
    for each in range(head, head + heads):
        for e in range(0, count, CHUNK):
            _add_chunk(kind, q, keys, parts, batch, each, e, min(e + CHUNK, count), tile, grads)


@device_function
def _add_chunk(
    kind: int, q: Array, keys: Keys, parts: Parts, batch: int, head: int, start: int, stop: int, tile: Tile,
    grads: Gradients,
) -> None:  # fmt: skip
    """Add what the queries ``start .. stop`` of those that reach the tile give, of one head."""
    shape, step, to = parts.shape, lanes(tile.scores), tile.to
    width, value_width = shape.width, shape.value_width
    lines = (batch * shape.heads + head) * shape.queries
    begin, end = TILE, 0
    for e in range(start, stop):
        begin, end = min(begin, tile.low[e]), max(end, tile.high[e])
    left, right = begin // step * step, (end + step - 1) // step * step
    opened, dropping = first_opened(parts, batch, head), parts.dropout.threshold > 0
    for e in range(start, stop, 4):
        last, place = min(stop - e, 4) - 1, (e - start) * TILE
        for i in range(4):
            to[i] = lines + tile.rows[e + min(i, last)]
        rows_by_matrix(
            grads.out, to[0] * value_width, to[1] * value_width, to[2] * value_width, to[3] * value_width, value_width,
            tile.value_strip, left, TILE, right - left, tile.grads, place + left, TILE,
        )  # fmt: skip
        rows_by_matrix(
            q, to[0] * width, to[1] * width, to[2] * width, to[3] * width, width, tile.strip, left, TILE, right - left,
            tile.scores, place + left, TILE,
        )  # fmt: skip
        for i in range(last + 1):
            row, low, high, mine = tile.rows[e + i], tile.low[e + i], tile.high[e + i], place + i * TILE
            line = lines + row
            scale_scores(tile.scores, tile.added, parts.scale, mine, left, right, low, high)
            if kind == SUMMARIES:
                hide_opened(parts.summaries.opened, opened + row, tile.scores, mine, tile.keys[0], left, right)
            elif tile.hidden[e + i]:
                hide_keys(kind, e + i, mine, parts, batch, tile)
            if dropping:
                drop(kind, line, mine, left, right, parts, tile, tile.grads)
            _score_gradients(
                tile.scores, tile.grads, mine + left, mine + right, grads.lse[line], grads.delta[line], parts.scale
            )
            if dropping:
                drop(kind, line, mine, left, right, parts, tile, tile.scores)
        for i in range(4):
            to[i] *= width
        add_four_sums(
            tile.grads, place, place + min(1, last) * TILE, place + min(2, last) * TILE, place + last * TILE, 1,
            tile.keys, begin, end, keys.k, keys.first * width, width, grads.q, to, tile.factors,
        )  # fmt: skip
    for t in range(begin, end, 4):
        shift, last = t - start * TILE, min(end - t, 4) - 1
        b, c, d = shift + min(1, last), shift + min(2, last), shift + last
        for i in range(4):
            to[i] = (keys.first + tile.keys[t + min(i, last)]) * value_width
        add_four_sums(
            tile.scores, shift, b, c, d, TILE, tile.rows, start, stop, grads.out, lines * value_width, value_width,
            keys.grad_v, to, tile.factors,
        )  # fmt: skip
        for i in range(4):
            to[i] = (keys.first + tile.keys[t + min(i, last)]) * width
        add_four_sums(
            tile.grads, shift, b, c, d, TILE, tile.rows, start, stop, q, lines * width, width, keys.grad_k, to,
            tile.factors,
        )  # fmt: skip


@inlined_function
def _score_gradients(
    scores: Array, grads: Array, start: int, stop: int, lse: float, delta: float, scale: float
) -> None:
    """Scores of a query and gradients of its weights → weights and gradients of its dot products."""
    shift, beside, factor = splat(scores, lse), splat(scores, delta), splat(scores, scale)
    for c in range(start, stop, lanes(scores)):
        weight = exp(sub(load(scores, c), shift))
        store(scores, c, weight)
        store(grads, c, mul(mul(weight, factor), sub(load(grads, c), beside)))
