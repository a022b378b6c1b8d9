"""The forward kernel of spans, slices and summaries: all of them in one running softmax per query."""

from __future__ import annotations

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
from ssa_framework.ops.neighbor_attention.numba_rows import Tables
from ssa_framework.ops.neighbor_attention.numba_tiles import (
    SLICES,
    SPANS,
    SUMMARIES,
    TILE,
    Parts,
    State,
    Tile,
    attend_tile,
    begin_rows,
    finish_rows,
)
from ssa_framework.ops.numba_runtime import bare_kernel, device_function


@bare_kernel
def attend_tiles(
    x: Tables, parts: Parts, batch: int, kv_head: int, start: int, stop: int, attended: bool, tile: Tile, order: Order,
    state: State,
) -> None:  # fmt: skip
    """Merge spans, slices and summaries of the queries ``start .. stop`` of a KV group into ``state``.

    ``attended``: it holds the output and log-sum-exp of band, columns and lists; it will hold those of all parts.
    """
    shape = parts.shape
    group = shape.heads // shape.kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        begin_rows(shape, batch, head, start, stop, attended, state)
    for first in range(start, stop, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, stop)
        _attend_spans(x, parts, batch, kv_head, first, last, tile, state)
        _attend_summaries(x, parts, batch, kv_head, first, last, tile, state)
    if parts.slices.start.shape[0]:
        step = shared_heads(parts)
        for head in range(kv_head * group, (kv_head + 1) * group, step):
            _attend_slices(x, parts, batch, kv_head, head, head + step, start, stop, tile, order, state)
    for head in range(kv_head * group, (kv_head + 1) * group):
        finish_rows(shape, batch, head, start, stop, state)


@device_function
def _attend_spans(
    x: Tables, parts: Parts, batch: int, kv_head: int, start: int, stop: int, tile: Tile, state: State
) -> None:
    shape = parts.shape
    group = shape.heads // shape.kv_heads
    values = (batch * shape.kv_heads + kv_head) * shape.keys * shape.value_width
    low, high = span_extent(parts, batch, start, stop)
    for first in range(low // TILE * TILE, high, TILE):
        count = load_span_tile(x, parts, batch, kv_head, start, stop, first, tile)
        for head in range(kv_head * group, (kv_head + 1) * group):
            attend_tile(SPANS, x.q, x.v, values, parts, batch, head, count, tile, state)


@device_function
def _attend_summaries(
    x: Tables, parts: Parts, batch: int, kv_head: int, start: int, stop: int, tile: Tile, state: State
) -> None:
    shape, summaries = parts.shape, parts.summaries
    group, total = shape.heads // shape.kv_heads, summaries.log_weight.shape[1]
    values = (batch * shape.kv_heads + kv_head) * total * shape.value_width
    for first in range(0, total, TILE):
        for level in range(summaries.first.shape[2]):
            count = load_summary_tile(parts, batch, kv_head, start, stop, level, first, tile)
            for head in range(kv_head * group, (kv_head + 1) * group):
                attend_tile(SUMMARIES, x.q, summaries.v, values, parts, batch, head, count, tile, state)


@device_function
def _attend_slices(
    x: Tables, parts: Parts, batch: int, kv_head: int, head: int, end_head: int, start: int, stop: int, tile: Tile,
    order: Order, state: State,
) -> None:  # fmt: skip
    """The slices that the heads ``head .. end_head`` share."""
    shape = parts.shape
    values = (batch * shape.kv_heads + kv_head) * shape.keys * shape.value_width
    count, place = sort_slices(parts, batch, head, start, stop, order), 0
    while place < count:
        after, end = same_start(order, place, count)
        for first in range(order.starts[place], end, TILE):
            reached = load_slice_tile(x, parts, batch, kv_head, head, order, place, after, first, tile)
            for each in range(head, end_head):
                attend_tile(SLICES, x.q, x.v, values, parts, batch, each, reached, tile, state)
        place = after
