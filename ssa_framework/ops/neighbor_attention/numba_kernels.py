"""The kernels: forward and gradients of queries, by query rows; gradients of keys and values, by key rows.

Each call works on a block of rows of one batch element and KV head, and writes these rows only. In the backward pass
the weights are computed again from the log-sum-exp, on both sides, so nothing is stored per edge but the lists of
incoming edges (`invert_list`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssa_framework.ops.neighbor_attention.numba_rows import (
    Array,
    Dropout,
    Graph,
    Shape,
    Tables,
    add_rows,
    allowed,
    bias_row,
    clear,
    collect_edges,
    dot_each,
    dropout_factor,
    in_band,
    list_of,
    multiply,
    query_hash,
    row_delta,
    softmax_in_place,
    span_of,
    weights_in_place,
)
from ssa_framework.ops.numba_runtime import bare_kernel, device_function
from ssa_framework.ops.numba_vectors import lanes, load, mul, splat, store, sub

_KEYS_AT_ONCE = 128


class Work(NamedTuple):
    """Buffers of one call, a whole number of vectors long."""

    rows: Array  # int32
    slots: Array  # int32
    a: Array
    b: Array
    c: Array
    d: Array


class Incoming(NamedTuple):
    """The queries that list each key: those of key j are ``queries[starts[list, j] : starts[list, j + 1]]``."""

    starts: Array  # int64 [lists, M + 1]
    queries: Array  # int32
    slots: Array  # int32, only with a bias


@bare_kernel
def attend_rows(
    x: Tables,
    graph: Graph,
    shape: Shape,
    dropout: Dropout,
    scale: float,
    batch: int,
    kv_head: int,
    start: int,
    stop: int,
    work: Work,
    out: Array,
    lse: Array,
) -> None:
    """``out`` and ``lse`` of the queries ``start .. stop`` of all heads of a KV group."""
    group = shape.heads // shape.kv_heads
    table = (batch * shape.kv_heads + kv_head) * shape.keys
    shared = shape.list_heads <= shape.kv_heads and shape.bias_heads <= 1
    has_bias = graph.bias.shape[0] > 0
    weights = work.a
    count = 0
    for row in range(start, stop):
        for head in range(kv_head * group, (kv_head + 1) * group):
            if head == kv_head * group or not shared:
                count = collect_edges(graph, shape, batch, head, row, work.rows, work.b, work.slots)
            line = (batch * shape.heads + head) * shape.queries + row
            clear(out, line * shape.value_width, shape.value_width)
            if count == 0:
                lse[line] = -np.inf
                continue
            dot_each(x.k, table * shape.width, shape.width, work.rows, 0, count, x.q, line * shape.width, weights)
            lse[line] = softmax_in_place(weights, count, scale, has_bias, work.b)
            if dropout.threshold:
                hashed = query_hash(dropout, line)
                for e in range(count):
                    weights[e] *= dropout_factor(dropout, hashed, work.rows[e])
            first = table * shape.value_width
            add_rows(x.v, first, shape.value_width, work.rows, weights, 0, count, out, line * shape.value_width)


@bare_kernel
def query_gradients(
    x: Tables,
    out: Array,
    grad_out: Array,
    grad_lse: Array,
    lse: Array,
    graph: Graph,
    shape: Shape,
    dropout: Dropout,
    scale: float,
    batch: int,
    kv_head: int,
    start: int,
    stop: int,
    work: Work,
    grad_q: Array,
    grad_bias: Array,
    delta: Array,
) -> None:
    """Gradients of a block of queries, added gradients of their bias, and ``delta = out · grad_out - grad_lse``.

    With p the weights and dp their gradients, the gradients of the scores are ``p · (dp - delta)`` (Dao et al.,
    FlashAttention, 2022).
    """
    group = shape.heads // shape.kv_heads
    table = (batch * shape.kv_heads + kv_head) * shape.keys
    first, value_first = table * shape.width, table * shape.value_width
    shared = shape.list_heads <= shape.kv_heads and shape.bias_heads <= 1
    has_bias = graph.bias.shape[0] > 0
    weights, grads = work.a, work.c
    step = lanes(weights)
    count = 0
    for row in range(start, stop):
        for head in range(kv_head * group, (kv_head + 1) * group):
            if head == kv_head * group or not shared:
                count = collect_edges(graph, shape, batch, head, row, work.rows, work.b, work.slots)
            line = (batch * shape.heads + head) * shape.queries + row
            at, value_at = line * shape.width, line * shape.value_width
            clear(grad_q, at, shape.width)
            delta[line] = row_delta(shape, out, grad_out, grad_lse, lse, line)
            if count == 0:
                continue
            shift = splat(weights, delta[line])
            hashed = query_hash(dropout, line)
            # a few keys at a time, so that they are still in the nearest cache when their sum is taken
            for begin in range(0, count, _KEYS_AT_ONCE):
                end = min(begin + _KEYS_AT_ONCE, count)
                dot_each(x.k, first, shape.width, work.rows, begin, end, x.q, at, weights)
                dot_each(x.v, value_first, shape.value_width, work.rows, begin, end, grad_out, value_at, grads)
                weights_in_place(weights, begin, end, scale, lse[line], has_bias, work.b)
                if dropout.threshold:
                    for e in range(begin, end):
                        grads[e] *= dropout_factor(dropout, hashed, work.rows[e])
                for e in range(begin, end, step):
                    store(grads, e, mul(load(weights, e), sub(load(grads, e), shift)))
                add_rows(x.k, first, shape.width, work.rows, grads, begin, end, grad_q, at)
            if has_bias:
                bias_line = bias_row(shape, batch, head, row)
                for e in range(count):
                    if work.slots[e] >= 0:
                        grad_bias[bias_line, work.slots[e]] += grads[e]
            multiply(grad_q, at, shape.width, scale)


@bare_kernel
def invert_list(neighbors: Array, start: int, with_slots: bool, keys: int, starts: Array, incoming: Incoming) -> None:
    """Counting sort of the edges of one list ``neighbors [N, K]`` by key; those of a key stay in order of queries.

    ``start`` is where the list begins in ``incoming.queries``.
    """
    starts[:] = 0
    for row in range(neighbors.shape[0]):
        for slot in range(neighbors.shape[1]):
            key = int(neighbors[row, slot])
            if 0 <= key < keys:
                starts[key + 1] += 1
    # first the end of the previous key, which moves to the own end while edges are written
    total = int(start)
    for key in range(keys + 1):
        total += starts[key]
        starts[key] = total
    for row in range(neighbors.shape[0]):
        for slot in range(neighbors.shape[1]):
            key = int(neighbors[row, slot])
            if 0 <= key < keys:
                place = starts[key]
                incoming.queries[place] = row
                if with_slots:
                    incoming.slots[place] = slot
                starts[key] = place + 1
    for key in range(keys, 0, -1):
        starts[key] = starts[key - 1]
    starts[0] = start


@device_function
def add_incoming(
    x: Tables,
    grad_out: Array,
    shape: Shape,
    dropout: Dropout,
    scale: float,
    lines: int,
    line: int,
    count: int,
    work: Work,
    grad_k: Array,
    grad_v: Array,
) -> None:
    """Add the edges in ``work`` to the gradients of one key: ``rows``, ``b`` = bias - lse, ``d`` = delta.

    ``lines`` is where the queries of the head begin, ``line`` the row of the key; ``grad_k`` lacks the factor scale.
    """
    weights, grads = work.a, work.c
    step = lanes(weights)
    for e in range(count, (count + step - 1) // step * step):
        work.rows[e] = work.rows[count - 1]
    first, value_first = lines * shape.width, lines * shape.value_width
    at, value_at = line * shape.width, line * shape.value_width
    dot_each(x.q, first, shape.width, work.rows, 0, count, x.k, at, weights)
    dot_each(grad_out, value_first, shape.value_width, work.rows, 0, count, x.v, value_at, grads)
    weights_in_place(weights, 0, count, scale, 0.0, True, work.b)
    if dropout.threshold:
        key = line % shape.keys
        for e in range(count):
            factor = dropout_factor(dropout, query_hash(dropout, lines + work.rows[e]), key)
            grads[e] = weights[e] * (grads[e] * factor - work.d[e])
            weights[e] *= factor
    else:
        for e in range(0, count, step):
            store(grads, e, mul(load(weights, e), sub(load(grads, e), load(work.d, e))))
    add_rows(x.q, first, shape.width, work.rows, grads, 0, count, grad_k, at)
    add_rows(grad_out, value_first, shape.value_width, work.rows, weights, 0, count, grad_v, value_at)


@bare_kernel
def key_gradients(
    x: Tables,
    grad_out: Array,
    lse: Array,
    delta: Array,
    graph: Graph,
    incoming: Incoming,
    is_column: Array,
    shape: Shape,
    dropout: Dropout,
    scale: float,
    batch: int,
    kv_head: int,
    start: int,
    stop: int,
    work: Work,
    grad_k: Array,
    grad_v: Array,
) -> None:
    """Gradients of the keys ``start .. stop``; ``lse`` is +inf for queries without neighbors (weight 0)."""
    group = shape.heads // shape.kv_heads
    room = work.rows.shape[0]
    for key in range(start, stop):
        line = (batch * shape.kv_heads + kv_head) * shape.keys + key
        clear(grad_k, line * shape.width, shape.width)
        clear(grad_v, line * shape.value_width, shape.value_width)
        for head in range(kv_head * group, (kv_head + 1) * group):
            lines = (batch * shape.heads + head) * shape.queries
            count = 0
            if graph.neighbors.shape[0]:
                member = list_of(shape, batch, head)
                bias_first = bias_row(shape, batch, head, 0)
                for e in range(incoming.starts[member, key], incoming.starts[member, key + 1]):
                    row = int(incoming.queries[e])
                    work.rows[count] = row
                    work.b[count] = -lse[lines + row]
                    work.d[count] = delta[lines + row]
                    if graph.bias.shape[0]:
                        work.b[count] += graph.bias[bias_first + row, incoming.slots[e]]
                    count += 1
                    if count == room:
                        add_incoming(x, grad_out, shape, dropout, scale, lines, line, count, work, grad_k, grad_v)
                        count = 0
            first, last = 0, shape.queries
            if not is_column[key]:
                if graph.before < 0:
                    last = 0
                first = max(key - graph.after - graph.offset, 0)
                last = min(key + graph.before - graph.offset + 1, last)
            for row in range(first, last):
                position = row + graph.offset
                if not in_band(graph, position, key) and graph.causal and key > position:
                    continue
                low, high = span_of(graph, batch, row)
                if low <= key < high:
                    continue
                if not allowed(graph, batch, row, key):
                    continue
                work.rows[count] = row
                work.b[count] = -lse[lines + row]
                work.d[count] = delta[lines + row]
                count += 1
                if count == room:
                    add_incoming(x, grad_out, shape, dropout, scale, lines, line, count, work, grad_k, grad_v)
                    count = 0
            if count:
                add_incoming(x, grad_out, shape, dropout, scale, lines, line, count, work, grad_k, grad_v)
        multiply(grad_k, line * shape.width, shape.width, scale)
