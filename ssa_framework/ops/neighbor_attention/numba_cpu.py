"""CPU kernels: fused forward and recomputing backward; nothing of size N·K·D, and nothing per edge but index lists.

Half precision is computed in float32 throughout, on float32 copies: weights are never rounded to the dtype of the
values, so results are at least as accurate with ``fp32_weights=False`` as with ``True``. Results do not depend on the
number of threads: each row is computed by one task, in an order that only the inputs determine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.numba_call import Call, aligned, blocks, flat, once, unflat
from ssa_framework.ops.neighbor_attention.numba_few_call import are_few
from ssa_framework.ops.neighbor_attention.numba_few_call import forward as attend_few
from ssa_framework.ops.neighbor_attention.numba_kernels import (
    Incoming,
    attend_rows,
    invert_list,
    key_gradients,
    query_gradients,
)
from ssa_framework.ops.neighbor_attention.numba_merge import attend_tiles
from ssa_framework.ops.neighbor_attention.numba_rows import Array, list_of
from ssa_framework.ops.neighbor_attention.numba_tile_gradients import CHUNK, Gradients, row_deltas, tile_gradients
from ssa_framework.ops.neighbor_attention.numba_tiles import State
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.numba_runtime import as_array, parallel_for

_INVERTED_BYTES = 4 * 2**20
ROWS_PER_GRADIENT = 8192  # queries whose slices are sorted together
_LEAST_TASKS = 8  # of the pass over tiles, on however many threads
_INCOMING_AT_ONCE = 64  # edges of a key: the rows that they read twice stay in the nearest cache


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: GraphParts,
    *,
    scale: float,
    dropout_p: float,
    seed: int,
    fp32_weights: bool,
) -> tuple[Tensor, Tensor]:
    """``q [B, H, N, D]``, ``k [B, Hkv, M, D]``, ``v [B, Hkv, M, Dv]`` → ``out [B, H, N, Dv]``, ``lse [B, H, N]``."""
    if are_few(q, k):
        return attend_few(q, k, v, parts, scale=scale, dropout_p=dropout_p, seed=seed)
    call = Call(q, k, v, parts, scale, dropout_p, seed)
    out = aligned(q.shape[:3].numel() * call.shape.value_width, call.dtype)
    lse, mass = (np.empty(q.shape[:3].numel(), call.dtype) for _ in range(2))
    tasks = call.row_tasks()
    most_rows = max((stop - start for *_, start, stop in tasks), default=0)

    def attend(task: int) -> None:
        if call.by_rows:
            work = call.work(call.most_edges)
            attend_rows(
                call.tables, call.graph, call.shape, call.dropout, call.scale, *tasks[task], work, out, lse
            )  # fmt: skip
        if call.has_tiles:
            tile, order = call.tile(most_rows), call.order(most_rows)
            attend_tiles(call.tables, call.parts, *tasks[task], call.by_rows, tile, order, State(out, lse, mass))

    parallel_for(attend, len(tasks))
    like = q.new_empty((*q.shape[:3], v.shape[-1]))
    return unflat(out, call.shape.value_width, like), torch.from_numpy(lse).view(q.shape[:3])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: GraphParts,
    *,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(q, k, v, bias, summary_k, summary_v)``; zeros without dimensions for what is not there."""
    call = Call(q, k, v, parts, scale, dropout_p, seed)
    shape, dtype, value_width = call.shape, call.dtype, call.shape.value_width
    rows = _Rows(
        out=flat(out, value_width),
        grad_out=flat(grad_out, value_width),
        grad_lse=as_array(grad_lse).astype(dtype, copy=False).reshape(-1),
        lse=as_array(lse).reshape(-1),
        delta=np.empty(lse.numel(), dtype),
    )
    reachable_lse = np.where(rows.lse == -np.inf, np.array(np.inf, dtype), rows.lse)
    summaries = call.parts.summaries
    tables = (*call.tables, summaries.k, summaries.v)
    grads = Gradients(rows.grad_out, reachable_lse, rows.delta, *(aligned(table.size, dtype) for table in tables))
    grad_bias = np.zeros_like(call.graph.bias)
    if call.by_rows:
        _query_gradients(call, rows, grads, grad_bias)
        _key_gradients(call, grads)
    else:
        _row_deltas(call, rows)
        for grad in (grads.q, grads.k, grads.v):
            grad.fill(0)
    if call.has_tiles:
        grads.summary_k.fill(0)
        grads.summary_v.fill(0)
        _tile_gradients(call, grads)

    def summary_gradient(grad: Array, width: int, like: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=call.compute) if like is None else unflat(grad, width, like)

    return (
        unflat(grads.q, shape.width, q),
        unflat(grads.k, shape.width, k),
        unflat(grads.v, value_width, v),
        _bias_gradient(grad_bias, parts.bias),
        summary_gradient(grads.summary_k, shape.width, parts.summary_k),
        summary_gradient(grads.summary_v, value_width, parts.summary_v),
    )


class _Rows(NamedTuple):
    """Numbers per query: flat, of all heads."""

    out: Array
    grad_out: Array
    grad_lse: Array
    lse: Array
    delta: Array  # of the backward pass, written


def _row_deltas(call: Call, rows: _Rows) -> None:
    every = list(blocks(rows.delta.size, 1))

    def some(task: int) -> None:
        row_deltas(call.shape, *rows[:4], *every[task], rows.delta)

    parallel_for(some, len(every))


def _query_gradients(call: Call, rows: _Rows, grads: Gradients, grad_bias: Array) -> None:
    """Gradients of queries and of the bias, through band, columns and lists; and delta."""
    shape, graph = call.shape, call.graph
    # whoever shares rows of the bias belongs to one task, which adds up their gradients
    own_batch = not graph.bias.shape[0] or shape.bias_batches == call.batch
    own_head = not graph.bias.shape[0] or shape.bias_heads == shape.heads
    owners = [
        (range(b, b + 1) if own_batch else range(call.batch), range(h, h + 1) if own_head else range(shape.kv_heads))
        for b in range(call.batch if own_batch else 1)
        for h in range(shape.kv_heads if own_head else 1)
    ]
    tasks = [(owner, block) for owner in owners for block in blocks(shape.queries, len(owners))]

    def by_queries(task: int) -> None:
        (batches, heads), block = tasks[task]
        work = call.work(call.most_edges)
        for b in batches:
            for h in heads:
                query_gradients(
                    call.tables, *rows[:4], graph, shape, call.dropout, call.scale, b, h, *block, work, grads.q,
                    grad_bias, rows.delta,
                )  # fmt: skip

    parallel_for(by_queries, len(tasks))


def _key_gradients(call: Call, grads: Gradients) -> None:
    """Gradients of keys and values, through band, columns and lists."""
    shape = call.shape
    # a few heads at a time, so that of the lists turned round only theirs exist
    pairs = [(b, h) for b in range(call.batch) for h in range(shape.kv_heads)]
    at_once = _pairs_at_once(call)
    for first in range(0, len(pairs), at_once):
        some = pairs[first : first + at_once]
        incoming = _invert(call, some)
        tasks = [(*pair, *block) for pair in some for block in blocks(shape.keys, len(some))]

        def by_keys(task: int, incoming: Incoming = incoming, tasks: list[Any] = tasks) -> None:
            work = call.work(_INCOMING_AT_ONCE)
            key_gradients(
                call.tables, grads.out, grads.lse, grads.delta, call.graph, incoming, call.is_column, shape,
                call.dropout, call.scale, *tasks[task], work, grads.k, grads.v,
            )  # fmt: skip

        parallel_for(by_keys, len(tasks))


def _tile_gradients(call: Call, grads: Gradients) -> None:
    """Add all gradients through spans, slices and summaries.

    A task is a KV head, or, where there are few, a part of its queries, whose gradients of keys are added up in the
    end. How many parts depends on the shapes alone, and so do the bits.
    """
    shape = call.shape
    heads = [(b, h) for b in range(call.batch) for h in range(shape.kv_heads)]
    starts = range(0, shape.queries, ROWS_PER_GRADIENT)
    count = max(1, min(len(starts), _LEAST_TASKS // max(1, len(heads))))
    shards = [starts[i * len(starts) // count : (i + 1) * len(starts) // count] for i in range(count)]
    copies = [
        grads if i == 0 else Gradients(*grads[:4], *(np.zeros_like(grad) for grad in grads[4:])) for i in range(count)
    ]
    tasks = [(head, i) for head in heads for i in range(count)]

    def by_tiles(task: int) -> None:
        head, i = tasks[task]
        room = min(ROWS_PER_GRADIENT, shape.queries)
        tile, order = call.tile(room, CHUNK), call.order(room)
        for start in shards[i]:
            stop = min(start + ROWS_PER_GRADIENT, shape.queries)
            tile_gradients(call.tables, call.parts, *head, start, stop, tile, order, copies[i])

    parallel_for(by_tiles, len(tasks))
    for other in copies[1:]:
        for total, grad in zip(grads[4:], other[4:], strict=True):
            total += grad


def _lists_of(call: Call, batch: int, kv_head: int) -> list[int]:
    """The lists that the query heads of a KV head go by."""
    shape = call.shape
    if not call.graph.neighbors.size:
        return []
    group = shape.heads // shape.kv_heads
    heads = range(kv_head * group, (kv_head + 1) * group)
    return sorted({int(list_of.py_func(shape, batch, head)) for head in heads})


def _pairs_at_once(call: Call) -> int:
    """Batch elements × KV heads whose lists are turned round together: enough for all threads."""
    one = call.shape.queries * call.graph.neighbors.shape[1] * 4 * max(1, len(_lists_of(call, 0, 0)))
    return max(torch.get_num_threads(), _INVERTED_BYTES // max(1, one))


def _invert(call: Call, pairs: list[tuple[int, int]]) -> Incoming:
    """The queries that list each key, for the lists of some batch elements and KV heads."""
    neighbors, keys, rows = call.graph.neighbors, call.shape.keys, call.shape.queries
    lists = sorted({number for pair in pairs for number in _lists_of(call, *pair)})
    every = call.shape.list_batches * call.shape.list_heads if neighbors.size else 0
    one = rows * neighbors.shape[1]
    with_slots = call.graph.bias.size > 0
    incoming = Incoming(
        np.empty((every, keys + 1), np.int64),
        np.empty(len(lists) * one, np.int32),
        np.empty(len(lists) * one if with_slots else 0, np.int32),
    )

    def invert(place: int) -> None:
        number = lists[place]
        mine = neighbors[number * rows : (number + 1) * rows]
        invert_list(mine, place * one, with_slots, keys, incoming.starts[number], incoming)

    parallel_for(invert, len(lists))
    return incoming


def _bias_gradient(grad: Array, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.zeros((), dtype=torch.from_numpy(grad).dtype)
    used = once(bias)
    if not grad.size:
        return torch.zeros(bias.shape, dtype=torch.from_numpy(grad).dtype)
    # the gradient of an expanded bias, summed over what it is expanded to, may lie in any one of the copies
    result = torch.zeros(bias.shape, dtype=torch.from_numpy(grad).dtype)
    result[: used.shape[0], : used.shape[1]] = torch.from_numpy(grad).view(used.shape)
    return result
