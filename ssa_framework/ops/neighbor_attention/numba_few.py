"""The forward kernel for few queries: every query reads the rows that it attends to, and nothing is transposed.

Tiles of keys pay where many queries share them. One query against a long cache is bound by memory: its band, columns,
list, span, slices and summaries become one list of rows, one softmax and one weighted sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssa_framework.ops.neighbor_attention.numba_reach import pick_head, slices_of
from ssa_framework.ops.neighbor_attention.numba_rows import (
    Array,
    Tables,
    add_rows,
    allowed,
    clear,
    collect_edges,
    dot_each,
    dropout_factor,
    query_hash,
    softmax_in_place,
    span_of,
)
from ssa_framework.ops.neighbor_attention.numba_tiles import Parts, covered, first_opened, pick
from ssa_framework.ops.numba_runtime import bare_kernel, device_function


class Rows(NamedTuple):
    """Where the tables of keys and values hold the rows of a head."""

    per_head: int  # rows from the beginning of one KV head to that of the next
    listed: bool  # no rows of keys, but those that each query attends to, one after the other


class Listed(NamedTuple):
    """The keys of every query, where their rows are gathered first; nothing where they are not."""

    edges: Array  # int32 [B · H · N, E]
    biases: Array  # [B · H · N, E], or nothing where there are none
    counts: Array  # int64 [B · H · N]


class FewWork(NamedTuple):
    """Buffers of one thread, a whole number of vectors long."""

    rows: Array  # int32
    slots: Array  # int32
    added: Array
    scores: Array
    opened: Array  # uint8 [C]


@bare_kernel
def attend_few(
    x: Tables, rows: Rows, parts: Parts, start: int, stop: int, work: FewWork, listed: Listed, out: Array, lse: Array
) -> None:  # fmt: skip
    """``out`` and ``lse`` of all queries of the query heads ``start .. stop``, counted over all batch elements.

    Where ``rows.listed``, the keys of a query are rows of the tables, as many as it has, from ``line * rows.per_head``.
    """
    shape = parts.shape
    for number in range(start, stop):
        batch, head = number // shape.heads, number % shape.heads
        kv_head = head * shape.kv_heads // shape.heads
        table = batch * shape.kv_heads + kv_head
        for row in range(shape.queries):
            line = number * shape.queries + row
            if rows.listed:
                count, first = int(listed.counts[line]), line * rows.per_head
                for e in range((count + 15) // 16 * 16):
                    work.rows[e] = min(e, count - 1)
                    work.added[e] = listed.biases[line, e] if e < count and listed.biases.shape[0] else 0
            else:
                count, first = collect_keys(parts, batch, head, row, work), table * rows.per_head
            begin = (count + 15) // 16 * 16
            end = collect_summaries(parts, batch, head, row, table, work, begin)
            at = line * shape.value_width
            clear(out, at, shape.value_width)
            if count == 0 and end == begin:
                lse[line] = -np.inf
                continue
            scores = work.scores
            if count:
                dot_each(x.k, first * shape.width, shape.width, work.rows, 0, count, x.q, line * shape.width, scores)
            for e in range(count, begin):
                work.added[e], scores[e] = -np.inf, 0
            total = table * parts.summaries.log_weight.shape[1]
            if begin < end:
                dot_each(
                    parts.summaries.k, total * shape.width, shape.width, work.rows, begin, end, x.q,
                    line * shape.width, scores,
                )  # fmt: skip
            lse[line] = softmax_in_place(scores, end if begin < end else count, parts.scale, True, work.added)
            if parts.dropout.threshold:
                drop_few(parts, line, count, begin, end, rows.listed, listed.edges, work)
            add_rows(x.v, first * shape.value_width, shape.value_width, work.rows, scores, 0, count, out, at)
            if begin < end:
                add_rows(
                    parts.summaries.v, total * shape.value_width, shape.value_width, work.rows, scores, begin, end,
                    out, at,
                )  # fmt: skip


@bare_kernel
def collect_few(parts: Parts, start: int, stop: int, work: FewWork, listed: Listed) -> None:
    """Fill ``listed`` for all queries of the query heads ``start .. stop``."""
    shape = parts.shape
    for number in range(start, stop):
        batch, head = number // shape.heads, number % shape.heads
        for row in range(shape.queries):
            line = number * shape.queries + row
            count = collect_keys(parts, batch, head, row, work)
            listed.counts[line] = count
            for e in range(count):
                listed.edges[line, e] = work.rows[e]
                if listed.biases.shape[0]:
                    listed.biases[line, e] = work.added[e]


@bare_kernel
def most_in_intervals(span_start: Array, span_end: Array, start: Array, end: Array) -> int:
    """The most places in the span of a query and, added to it, in its slices; the span and the slices may be those of
    different queries."""
    longest = most = 0
    for b in range(span_start.shape[0]):
        for n in range(span_start.shape[1]):
            longest = max(longest, span_end[b, n] - span_start[b, n])
    for b in range(start.shape[0]):
        for g in range(start.shape[1]):
            for n in range(start.shape[2]):
                total = 0
                for p in range(start.shape[3]):
                    total += end[b, g, n, p] - start[b, g, n, p]
                most = max(most, total)
    return longest + most


@device_function
def collect_keys(parts: Parts, batch: int, head: int, row: int, work: FewWork) -> int:
    """The keys of band, columns, list, span and slices of a query; returns how many.

    Filled up to a whole vector with the last one, which is attended to: reading it is harmless.
    """
    graph, shape, slices = parts.graph, parts.shape, parts.slices
    count = collect_edges(graph, shape, batch, head, row, work.rows, work.added, work.slots)
    if not graph.bias.shape[0]:
        for e in range(count):
            work.added[e] = 0
    listed = count
    plain = graph.key_keep.shape[0] == 0 and graph.query_segments.shape[0] == 0
    low, high = span_of(graph, batch, row)
    for key in range(low, min(high, shape.keys)):
        if plain or allowed(graph, batch, row, key):
            work.rows[count] = key
            count += 1
    if slices.start.shape[0]:
        last, low, high, band, end = covered(parts, batch, row)
        starts, ends = slices_of(parts, batch, head)
        order = slices.order[pick(slices.order.shape[0], batch), pick_head(slices.order.shape[1], head, shape.heads)]
        for p in range(starts.shape[1]):
            for place in range(starts[row, p], ends[row, p]):
                key = int(order[place])
                if key > last or low <= key < high or band <= key < end or is_among(graph.columns, key):
                    continue
                if plain or allowed(graph, batch, row, key):
                    work.rows[count] = key
                    count += 1
    for e in range(listed, count):
        work.added[e] = 0
    for e in range(count, (count + 15) // 16 * 16):
        work.rows[e] = work.rows[count - 1]
    return count


@device_function
def is_among(columns: Array, key: int) -> bool:
    """Whether ``key`` is in ``columns``, which ascend."""
    low, high = 0, columns.shape[0]
    while low < high:
        middle = (low + high) // 2
        if columns[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low < columns.shape[0] and columns[low] == key


@device_function
def collect_summaries(parts: Parts, batch: int, head: int, row: int, table: int, work: FewWork, begin: int) -> int:
    """The summaries that a query attends, at the places ``begin ..`` of ``work``; returns one past the last."""
    summaries, end = parts.summaries, begin
    if not summaries.first.shape[0]:
        return end
    element, opened = pick(summaries.first.shape[0], batch), summaries.opened
    line = first_opened(parts, batch, head) + row
    for p in range(opened.shape[1]):
        if opened[line, p] >= 0:
            work.opened[opened[line, p]] = 1
    for level in range(summaries.first.shape[2]):
        for c in range(summaries.first[element, row, level], summaries.stop[element, row, level]):
            work.rows[end], work.added[end] = c, summaries.log_weight[table, c]
            end += (work.added[end] > -np.inf) & (work.opened[c] == 0)
    for p in range(opened.shape[1]):
        if opened[line, p] >= 0:
            work.opened[opened[line, p]] = 0
    for e in range(end, (end + 15) // 16 * 16):
        work.rows[e] = work.rows[max(end - 1, 0)]
    return end


@device_function
def drop_few(
    parts: Parts, line: int, count: int, begin: int, end: int, listed: bool, edges: Array, work: FewWork
) -> None:
    """Multiply the weights of a query by their dropout factors."""
    hashed = query_hash(parts.dropout, line)
    for e in range(count):
        key = edges[line, e] if listed else work.rows[e]
        work.scores[e] *= dropout_factor(parts.dropout, hashed, key)
    for e in range(begin, end):
        work.scores[e] *= dropout_factor(parts.dropout, hashed, parts.shape.keys + work.rows[e])
