"""What the attention kernels are made of: the edges of a query, dot products with listed rows, weighted sums of them.

A *table* is a flat array of rows of one width, a multiple of the vector length; `first` is where a head begins in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssa_framework.ops.numba_llvm import SUMS
from ssa_framework.ops.numba_products import dot_rows
from ssa_framework.ops.numba_runtime import device_function, inlined_function
from ssa_framework.ops.numba_vectors import (
    add,
    copy_keys,
    exp,
    fma,
    lanes,
    load,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
)

Array = np.ndarray[Any, Any]


class Graph(NamedTuple):
    """`GraphParts` as kernels see them; what is absent has no rows."""

    neighbors: Array  # int32 [list batches · list heads · N, K]
    bias: Array  # [bias batches · bias heads · N, K]
    columns: Array  # int32 [C]
    key_keep: Array  # uint8 [B or 1, M]
    query_segments: Array  # int64 [B or 1, N]
    key_segments: Array  # int64 [B or 1, M]
    span_start: Array  # int32 [B or 1, N]
    span_end: Array
    before: int  # -1: no band
    after: int  # 0 where causal
    offset: int
    causal: bool


class Tables(NamedTuple):
    """Queries, keys, values; rows padded to a whole number of vectors, flat."""

    q: Array
    k: Array
    v: Array


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int  # of the rows of queries and keys, padded
    value_width: int
    list_batches: int
    list_heads: int
    bias_batches: int
    bias_heads: int


class Dropout(NamedTuple):
    threshold: int  # an edge is dropped if its 32-bit hash lies below; 0 = no dropout
    factor: float  # of the kept weights
    seed: int


@device_function
def list_of(shape: Shape, batch: int, head: int) -> int:
    """Which list of neighbors a query head uses."""
    member = head * shape.list_heads // shape.heads
    return (batch if shape.list_batches > 1 else 0) * shape.list_heads + member


@device_function
def bias_row(shape: Shape, batch: int, head: int, row: int) -> int:
    """The row of ``Graph.bias`` of one query."""
    owner = (batch if shape.bias_batches > 1 else 0) * shape.bias_heads + (head if shape.bias_heads > 1 else 0)
    return owner * shape.queries + row


@device_function
def in_band(graph: Graph, position: int, key: int) -> bool:
    return graph.before >= 0 and position - graph.before <= key <= position + graph.after


@device_function
def span_of(graph: Graph, batch: int, row: int) -> tuple[int, int]:
    """First and one past the last key of the span of a query; 0, 0 where there are no spans."""
    if not graph.span_start.shape[0]:
        return 0, 0
    batch = batch if graph.span_start.shape[0] > 1 else 0
    end = int(graph.span_end[batch, row])
    if graph.causal:
        end = min(end, row + graph.offset + 1)
    return int(graph.span_start[batch, row]), end


@device_function
def allowed(graph: Graph, batch: int, row: int, key: int) -> bool:
    """Padding and documents, which all but lists and summaries respect (they are already cleaned)."""
    if graph.key_keep.shape[0] and not graph.key_keep[batch if graph.key_keep.shape[0] > 1 else 0, key]:
        return False
    if graph.query_segments.shape[0]:
        mine = graph.query_segments[batch if graph.query_segments.shape[0] > 1 else 0, row]
        return mine == graph.key_segments[batch if graph.key_segments.shape[0] > 1 else 0, key]
    return True


@device_function
def collect_list(graph: Graph, shape: Shape, line: int, keys: Array, count: int) -> int:
    """Append the filled slots of one list to ``keys``; sixteen at once where all of them are filled, or none."""
    slots = graph.neighbors.shape[1]
    flat = graph.neighbors.reshape(-1)
    slot = 0
    while slot < slots:
        if slot + 16 <= slots:
            filled = copy_keys(flat, line * slots + slot, keys, count, shape.keys)
            if filled == 0xFFFF:
                count += 16
            if filled == 0xFFFF or filled == 0:
                slot += 16
                continue
        for t in range(slot, min(slot + 16, slots)):
            key = int(graph.neighbors[line, t])
            keys[count] = key
            count += 0 <= key < shape.keys
        slot += 16
    return count


@inlined_function
def collect_edges(
    graph: Graph, shape: Shape, batch: int, head: int, row: int, keys: Array, added: Array, slots: Array
) -> int:
    """The keys of a query: band, columns, list; returns their number.

    ``keys`` is filled up to a whole vector with the last one (a key that is attended: reading it is harmless).
    Where there is a bias, ``added`` gets it (0 for band and columns) and ``slots`` the slot, or -1.
    """
    count = 0
    position = row + graph.offset
    plain = graph.key_keep.shape[0] == 0 and graph.query_segments.shape[0] == 0
    has_bias = graph.bias.shape[0] > 0
    span_start, span_end = span_of(graph, batch, row)
    if graph.before >= 0:
        low, high = max(position - graph.before, 0), min(position + graph.after + 1, shape.keys)
        if plain and span_start >= span_end:
            for e in range(high - low):
                keys[e] = low + e
            count = max(high - low, 0)
        else:
            for key in range(low, high):
                if not span_start <= key < span_end and allowed(graph, batch, row, key):
                    keys[count] = key
                    count += 1
    for c in range(graph.columns.shape[0]):
        key = int(graph.columns[c])
        if (graph.causal and key > position) or in_band(graph, position, key) or span_start <= key < span_end:
            continue
        if plain or allowed(graph, batch, row, key):
            keys[count] = key
            count += 1
    if graph.neighbors.shape[0]:
        if has_bias:
            for e in range(count):
                added[e] = 0
                slots[e] = -1
        line = list_of(shape, batch, head) * shape.queries + row
        if has_bias:
            bias_line = bias_row(shape, batch, head, row)
            for slot in range(graph.neighbors.shape[1]):
                key = int(graph.neighbors[line, slot])
                bias = graph.bias[bias_line, slot]
                if 0 <= key < shape.keys and bias != -np.inf:
                    keys[count], added[count], slots[count] = key, bias, slot
                    count += 1
        else:
            count = collect_list(graph, shape, line, keys, count)
    if count:
        for e in range(count, (count + 15) // 16 * 16):
            keys[e] = keys[count - 1]
            if has_bias:
                added[e] = 0
    return count


@inlined_function
def dot_each(
    table: Array, first: int, width: int, rows: Array, begin: int, end: int, x: Array, at: int, out: Array
) -> None:
    """``out[e] = x[at : at + width] · row rows[e]`` for begin ≤ e < end, and up to a whole vector."""
    for e in range(begin, end, lanes(out)):
        store(out, e, dot_rows(table, first, width, rows, e, x, at))


@inlined_function
def add_rows(
    table: Array, first: int, width: int, rows: Array, weights: Array, begin: int, end: int, out: Array, at: int
) -> None:
    """``out[at : at + width] += Σ weights[e] · row rows[e]`` over begin ≤ e < end."""
    odd = (end - begin) % 2
    step = lanes(table)
    c = 0
    while SUMS == 16 and c + 4 * step <= width:  # four vectors of two rows at once: eight independent sums
        a0, a1 = load(out, at + c), load(out, at + c + step)
        a2, a3 = load(out, at + c + 2 * step), load(out, at + c + 3 * step)
        b0 = b1 = b2 = b3 = splat(table, 0.0)
        for e in range(begin, end - 1, 2):
            p, w = first + int(rows[e]) * width + c, splat(table, weights[e])
            a0, a1 = fma(w, load(table, p), a0), fma(w, load(table, p + step), a1)
            a2, a3 = fma(w, load(table, p + 2 * step), a2), fma(w, load(table, p + 3 * step), a3)
            p, w = first + int(rows[e + 1]) * width + c, splat(table, weights[e + 1])
            b0, b1 = fma(w, load(table, p), b0), fma(w, load(table, p + step), b1)
            b2, b3 = fma(w, load(table, p + 2 * step), b2), fma(w, load(table, p + 3 * step), b3)
        if odd:
            p, w = first + int(rows[end - 1]) * width + c, splat(table, weights[end - 1])
            a0, a1 = fma(w, load(table, p), a0), fma(w, load(table, p + step), a1)
            a2, a3 = fma(w, load(table, p + 2 * step), a2), fma(w, load(table, p + 3 * step), a3)
        store(out, at + c, add(a0, b0))
        store(out, at + c + step, add(a1, b1))
        store(out, at + c + 2 * step, add(a2, b2))
        store(out, at + c + 3 * step, add(a3, b3))
        c += 4 * step
    while c + 2 * step <= width:
        a0, a1 = load(out, at + c), load(out, at + c + step)
        b0 = b1 = splat(table, 0.0)
        for e in range(begin, end - 1, 2):
            p, w = first + int(rows[e]) * width + c, splat(table, weights[e])
            a0, a1 = fma(w, load(table, p), a0), fma(w, load(table, p + step), a1)
            p, w = first + int(rows[e + 1]) * width + c, splat(table, weights[e + 1])
            b0, b1 = fma(w, load(table, p), b0), fma(w, load(table, p + step), b1)
        if odd:
            p, w = first + int(rows[end - 1]) * width + c, splat(table, weights[end - 1])
            a0, a1 = fma(w, load(table, p), a0), fma(w, load(table, p + step), a1)
        store(out, at + c, add(a0, b0))
        store(out, at + c + step, add(a1, b1))
        c += 2 * step
    while c < width:
        a, b = load(out, at + c), splat(table, 0.0)
        for e in range(begin, end - 1, 2):
            a = fma(splat(table, weights[e]), load(table, first + int(rows[e]) * width + c), a)
            b = fma(splat(table, weights[e + 1]), load(table, first + int(rows[e + 1]) * width + c), b)
        if odd:
            e = end - 1
            a = fma(splat(table, weights[e]), load(table, first + int(rows[e]) * width + c), a)
        store(out, at + c, add(a, b))
        c += step


@device_function
def clear(out: Array, at: int, width: int) -> None:
    for c in range(0, width, lanes(out)):
        store(out, at + c, splat(out, 0.0))


@device_function
def multiply(out: Array, at: int, width: int, factor: float) -> None:
    """``out[at : at + width] *= factor``; width is a whole number of vectors, or the rest up to one may be lost."""
    for c in range(0, width, lanes(out)):
        store(out, at + c, mul(load(out, at + c), splat(out, factor)))


@device_function
def score(dots: Any, factor: Any, has_bias: bool, added: Array, e: int) -> Any:
    """Dot products → scores of one vector of edges."""
    return fma(dots, factor, load(added, e)) if has_bias else mul(dots, factor)


@device_function
def softmax_in_place(scores: Array, count: int, scale: float, has_bias: bool, added: Array) -> Any:
    """Dot products → ``exp(score - lse)``; returns lse. There is at least one edge."""
    step = lanes(scores)
    factor = splat(scores, scale)
    largest = splat(scores, -np.inf)
    for e in range(0, count, step):
        scored = score(load(scores, e), factor, has_bias, added, e)
        store(scores, e, scored)
        if e + step > count:
            for t in range(count, e + step):
                scores[t] = -np.inf
            scored = load(scores, e)
        largest = maximum(largest, scored)
    top = max_lanes(largest)
    shift, total = splat(scores, top), splat(scores, 0.0)
    for e in range(0, count, step):
        weight = exp(sub(load(scores, e), shift))
        store(scores, e, weight)
        total = add(total, weight)
    mass = sum_lanes(total)
    multiply(scores, 0, count, 1 / mass)
    return top + np.log(mass)


@inlined_function
def weights_in_place(
    scores: Array, begin: int, end: int, scale: float, lse: float, has_bias: bool, added: Array
) -> None:
    """Dot products → ``exp(score - lse)``; what lies beyond ``end`` in the last vector is meaningless."""
    factor, shift = splat(scores, scale), splat(scores, lse)
    for e in range(begin, end, lanes(scores)):
        store(scores, e, exp(sub(score(load(scores, e), factor, has_bias, added, e), shift)))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@device_function
def mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): uint64 → uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@device_function
def query_hash(dropout: Dropout, line: int) -> Any:
    """Of one query of one head; ``line`` numbers all queries of all heads."""
    return mix(np.uint64(dropout.seed) + np.uint64(line + 1) * _GOLDEN)


@device_function
def dropout_factor(dropout: Dropout, hashed: Any, key: int) -> Any:
    """0 or ``dropout.factor``, by the query (its `query_hash`) and the key alone: the same whoever asks."""
    drawn = mix(hashed + np.uint64(key + 1) * _GOLDEN) >> np.uint64(32)
    return dropout.factor if int(drawn) >= dropout.threshold else 0.0


@inlined_function
def row_delta(shape: Shape, out: Array, grad_out: Array, grad_lse: Array, lse: Array, line: int) -> Any:
    """``out · grad_out - grad_lse`` of one query; 0 where it has no neighbors."""
    if lse[line] == -np.inf:
        return lse.dtype.type(0)
    total = splat(out, 0.0)
    for c in range(line * shape.value_width, (line + 1) * shape.value_width, lanes(out)):
        total = fma(load(out, c), load(grad_out, c), total)
    return sum_lanes(total) - grad_lse[line]
