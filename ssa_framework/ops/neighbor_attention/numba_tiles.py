"""Tiles of up to 64 keys, attended by many queries at once: what spans, slices and summaries have in common.

The keys of a tile are transposed once (`load_strip`). Four queries at a time then get their scores as a small matrix
product, hide what they do not reach, and merge the tile into their running softmax. A query computes the same bits
whoever else reaches the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssa_framework.ops.neighbor_attention.numba_rows import (
    Array,
    Dropout,
    Graph,
    Shape,
    clear,
    dropout_factor,
    multiply,
    query_hash,
    span_of,
)
from ssa_framework.ops.numba_products import add_four_sums, rows_by_matrix
from ssa_framework.ops.numba_runtime import device_function, inlined_function
from ssa_framework.ops.numba_vectors import (
    add,
    exp,
    fma,
    lanes,
    load,
    max_lanes,
    maximum,
    only_lanes,
    replace_lanes,
    set_of_numbers,
    splat,
    store,
    sub,
    sum_lanes,
    transpose_tile,
)

TILE = 64
SPANS, SLICES, SUMMARIES = 0, 1, 2


class Slices(NamedTuple):
    """`GraphParts` of slices; without any, nothing has rows."""

    order: Array  # int32 [B or 1, G or 1, L]
    start: Array  # int32 [B or 1, G or 1, N, P]
    end: Array
    is_column: Array  # bool [M], or nothing where there are no columns


class Summaries(NamedTuple):
    """`GraphParts` of summaries; without any, nothing has rows."""

    k: Array  # as in Tables
    v: Array
    log_weight: Array  # [B · Hkv, C]
    first: Array  # int32 [B or 1, N, R]
    stop: Array
    opened: Array  # int32 [batches · heads · N, P]
    opened_batches: int
    opened_heads: int


class Parts(NamedTuple):
    """Everything that is attended, and how."""

    graph: Graph
    slices: Slices
    summaries: Summaries
    shape: Shape
    dropout: Dropout
    scale: float


class Tile(NamedTuple):
    """Keys, the queries that reach them and room for their scores; work arrays of one thread."""

    keys: Array  # int32 [TILE], rows of the tables
    added: Array  # [TILE], to the scores; -inf hides a key from every query
    segments: Array  # int64 [TILE], documents
    strip: Array  # [width, TILE], transposed keys
    value_strip: Array  # [value_width, TILE], for gradients
    rows: Array  # int32 [R + 1], queries in ascending order,
    low: Array  # int32 [R + 1], and the places of the tile that they reach: from low
    high: Array  # int32 [R + 1], to high - 1,
    hidden: Array  # bool [R + 1], of which some may be hidden
    scores: Array  # [at least 4, TILE]
    grads: Array  # [at least 4, TILE], for gradients
    to: Array  # int64 [4], rows to add to,
    factors: Array  # [4], multiplied first


class State(NamedTuple):
    """The running softmax of all queries of all heads."""

    out: Array  # not yet divided by the mass
    largest: Array  # score so far; in the end, the log-sum-exp
    mass: Array


@device_function
def pick(count: int, batch: int) -> int:
    """The place of a batch element on an axis that may be broadcast."""
    return batch if count > 1 else 0


@device_function
def load_strip(table: Array, first: int, width: int, keys: Array, count: int, strip: Array) -> None:
    """Rows ``keys[:count]`` of a table as the columns of ``strip [width, TILE]``."""
    step = lanes(table)
    for t in range(0, count, step):
        for d in range(0, width, step):
            transpose_tile(table, first + d, width, keys, t, min(step, count - t), strip, d * TILE + t, TILE)


@device_function
def hide_padding(parts: Parts, batch: int, count: int, tile: Tile) -> None:
    """Fill ``added`` and ``segments`` for the keys of a tile."""
    keep, segments = parts.graph.key_keep, parts.graph.key_segments
    for t in range(TILE):
        tile.added[t] = 0
    if keep.shape[0]:
        for t in range(count):
            tile.added[t] = 0 if keep[pick(keep.shape[0], batch), tile.keys[t]] else -np.inf
    if segments.shape[0]:
        for t in range(count):
            tile.segments[t] = segments[pick(segments.shape[0], batch), tile.keys[t]]


@device_function
def covered(parts: Parts, batch: int, row: int) -> tuple[int, int, int, int, int]:
    """Where slices give way: the last key that a query attends, its span, and its band, from first to one past last."""
    graph, position = parts.graph, row + parts.graph.offset
    last = position if graph.causal else parts.shape.keys
    band, end = (position - graph.before, position + graph.after + 1) if graph.before >= 0 else (0, 0)
    return last, *span_of(graph, batch, row), band, end


@device_function
def may_hide(parts: Parts, batch: int, row: int, least: int, most: int) -> bool:
    """Whether a query may have to do without some keys of a slice, which lie between ``least`` and ``most``."""
    last, low, high, band, end = covered(parts, batch, row)
    apart = (most < low) | (least >= high)
    return not (apart & ((most < band) | (least >= end)) & (most <= last)) or parts.graph.query_segments.shape[0] > 0


@device_function
def hide_keys(kind: int, e: int, place: int, parts: Parts, batch: int, tile: Tile) -> None:
    """Hide other documents from a query; in slices, also what its span and its band have, and later keys if causal.

    The scores of the query begin at ``tile.scores[place]``.
    """
    row, segments = tile.rows[e], parts.graph.query_segments
    if kind == SLICES:
        last, low, high, band, end = covered(parts, batch, row)
        for t in range(tile.low[e], tile.high[e]):
            key = tile.keys[t]
            hidden = (key > last) | ((key >= low) & (key < high)) | ((key >= band) & (key < end))
            tile.scores[place + t] = -np.inf if hidden else tile.scores[place + t]
    if segments.shape[0]:
        mine = segments[pick(segments.shape[0], batch), row]
        for t in range(tile.low[e], tile.high[e]):
            tile.scores[place + t] = tile.scores[place + t] if tile.segments[t] == mine else -np.inf


@device_function
def first_opened(parts: Parts, batch: int, head: int) -> int:
    """Where the queries of a head begin in ``Summaries.opened``."""
    heads = parts.summaries.opened_heads
    member = pick(parts.summaries.opened_batches, batch) * heads + head * heads // parts.shape.heads
    return member * parts.shape.queries


@device_function
def hide_opened(opened: Array, line: int, scores: Array, place: int, first: int, left: int, right: int) -> None:
    """Hide the summaries that a query has opened, ``opened[line]``, in the vectors of scores ``left .. right``.

    The tile begins with the summary ``first``.
    """
    numbers, count = opened.reshape(opened.size), opened.shape[1]
    at, bits = line * count, 0
    for p in range(0, count - 15, 16):
        bits |= set_of_numbers(numbers, at + p, first)
    if count >= 16:
        bits |= set_of_numbers(numbers, at + count - 16, first)
    else:
        for p in range(count):
            t = opened[line, p] - first
            bits |= 1 << t if 0 <= t < TILE else 0
    if bits:
        for c in range(left, right, lanes(scores)):
            store(scores, place + c, replace_lanes(load(scores, place + c), bits >> c, -np.inf))


@inlined_function
def scale_scores(
    scores: Array, added: Array, scale: float, place: int, left: int, right: int, low: int, high: int
) -> None:
    """Dot products of a query with the keys ``left .. right`` → scores; -inf beyond ``low .. high``."""
    step, factor = lanes(scores), splat(scores, scale)
    for c in range(left, right, step):
        scored = fma(load(scores, place + c), factor, load(added, c))
        if c < low or c + step > high:
            scored = only_lanes(scored, low - c, high - c, -np.inf)
        store(scores, place + c, scored)


@inlined_function
def merge_weights(scores: Array, largest: Array, mass: Array, line: int, place: int, left: int, right: int) -> float:
    """Scores of a query → weights relative to its largest score; returns the factor of what it has so far."""
    step = lanes(scores)
    top = load(scores, place + left)
    for c in range(left + step, right, step):
        top = maximum(top, load(scores, place + c))
    before = largest[line]
    most = max(max_lanes(top), before)
    if most == -np.inf:
        for c in range(left, right, step):
            store(scores, place + c, splat(scores, 0.0))
        return 1.0
    shift, total = splat(scores, most), splat(scores, 0.0)
    for c in range(left, right, step):
        weight = exp(sub(load(scores, place + c), shift))
        store(scores, place + c, weight)
        total = add(total, weight)
    if most == before:
        mass[line] += sum_lanes(total)
        return 1.0
    factor = max_lanes(exp(sub(splat(scores, before), shift)))
    largest[line] = most
    mass[line] = mass[line] * factor + sum_lanes(total)
    return float(factor)


@device_function
def drop(kind: int, line: int, place: int, begin: int, end: int, parts: Parts, tile: Tile, numbers: Array) -> None:
    """Multiply ``numbers[place + begin : place + end]`` of a query by their dropout factors."""
    hashed = query_hash(parts.dropout, line)
    beyond = parts.shape.keys if kind == SUMMARIES else 0
    for t in range(begin, end):
        numbers[place + t] *= dropout_factor(parts.dropout, hashed, beyond + tile.keys[t])


@device_function
def attend_tile(
    kind: int, q: Array, v: Array, v_first: int, parts: Parts, batch: int, head: int, count: int, tile: Tile,
    state: State,
) -> None:  # fmt: skip
    """Merge a tile into the softmax of the ``count`` queries that reach it, of one head."""
    shape, scores, step = parts.shape, tile.scores, lanes(tile.scores)
    lines = (batch * shape.heads + head) * shape.queries
    opened = first_opened(parts, batch, head)
    for e in range(0, count, 4):
        last = min(count - e, 4) - 1
        begin, end = TILE, 0
        for i in range(last + 1):
            begin, end = min(begin, tile.low[e + i]), max(end, tile.high[e + i])
        left, right = begin // step * step, (end + step - 1) // step * step
        for i in range(4):
            tile.to[i] = (lines + tile.rows[e + min(i, last)]) * shape.width
        rows_by_matrix(
            q, tile.to[0], tile.to[1], tile.to[2], tile.to[3], shape.width, tile.strip, left, TILE, right - left,
            scores, left, TILE,
        )  # fmt: skip
        for i in range(last + 1):
            row = tile.rows[e + i]
            line = lines + row
            place, low, high = i * TILE, tile.low[e + i], tile.high[e + i]
            # sums over as many vectors as the query alone reaches: the compiler may add them up in any order
            mine, end_mine = low // step * step, (high + step - 1) // step * step
            clear(scores, place + left, mine - left)
            clear(scores, place + end_mine, right - end_mine)
            scale_scores(scores, tile.added, parts.scale, place, mine, end_mine, low, high)
            if kind == SUMMARIES:
                hide_opened(parts.summaries.opened, opened + row, scores, place, tile.keys[0], mine, end_mine)
            elif tile.hidden[e + i]:
                hide_keys(kind, e + i, place, parts, batch, tile)
            tile.factors[i] = merge_weights(scores, state.largest, state.mass, line, place, mine, end_mine)
            tile.to[i] = line * shape.value_width
            if parts.dropout.threshold:
                drop(kind, line, place, low, high, parts, tile, scores)
        for i in range(last + 1, 4):  # copies of the last one compute the same once more
            tile.factors[i], tile.to[i] = tile.factors[last], tile.to[last]
        add_four_sums(
            scores, 0, min(1, last) * TILE, min(2, last) * TILE, last * TILE, 1, tile.keys, begin, end, v, v_first,
            shape.value_width, state.out, tile.to, tile.factors,
        )  # fmt: skip


@device_function
def begin_rows(shape: Shape, batch: int, head: int, start: int, stop: int, attended: bool, state: State) -> None:
    """Start the softmax of some queries with what they have attended, or with nothing."""
    first = (batch * shape.heads + head) * shape.queries
    for line in range(first + start, first + stop):
        if not attended:
            state.largest[line] = -np.inf
            clear(state.out, line * shape.value_width, shape.value_width)
        state.mass[line] = 0 if state.largest[line] == -np.inf else 1


@device_function
def finish_rows(shape: Shape, batch: int, head: int, start: int, stop: int, state: State) -> None:
    """Divide by the mass, and turn the largest score into the log-sum-exp."""
    first = (batch * shape.heads + head) * shape.queries
    for line in range(first + start, first + stop):
        if state.mass[line] > 0:
            multiply(state.out, line * shape.value_width, shape.value_width, 1 / state.mass[line])
            state.largest[line] += np.log(state.mass[line])
