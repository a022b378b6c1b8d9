"""CPU kernels: fused forward and recomputing backward; nothing of size N·K·D, and nothing per edge but index lists.

Half precision is computed in float32 throughout, on float32 copies: weights are never rounded to the dtype of the
values, so results are at least as accurate with ``fp32_weights=False`` as with ``True``. Results do not depend on the
number of threads: each row is computed by one task, in an order that only the inputs determine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.numba_kernels import (
    Incoming,
    Tables,
    Work,
    attend_rows,
    invert_list,
    key_gradients,
    query_gradients,
)
from ssa_framework.ops.neighbor_attention.numba_rows import Array, Dropout, Graph, Shape, list_of
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.numba_runtime import as_array, parallel_for
from ssa_framework.ops.numba_simd import LANES

_ROWS_PER_TASK = (128, 1024)
"""At least and at most: a task takes the interpreter some 30 µs, in which no other thread can start one."""
_TASKS_PER_THREAD = 8  # so that unequal ones balance
_INVERTED_BYTES = 4 * 2**20
_INCOMING_AT_ONCE = 64  # edges of a key: the rows that they read twice stay in the nearest cache


def _aligned(count: int, dtype: Any) -> Array:
    """An empty array that starts a cache line, so that no vector lies in two: half the time of a kernel."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(count + 64 // item, dtype)
    start = -raw.ctypes.data % 64 // item
    return raw[start : start + count]


def _flat(x: Tensor, padded: int) -> Array:
    """``[.., D]`` → flat array of rows of width ``padded``; the padding is zero."""
    rows = as_array(x)
    if rows.shape[-1] != padded:
        wide = _aligned(rows.size // max(1, rows.shape[-1]) * padded, rows.dtype).reshape(*rows.shape[:-1], padded)
        wide[..., rows.shape[-1] :] = 0
        wide[..., : rows.shape[-1]] = rows
        rows = wide
    flat = rows.reshape(-1)
    if flat.ctypes.data % 64:
        flat = _aligned(flat.size, flat.dtype)
        flat[:] = rows.reshape(-1)
    return flat


def _unflat(flat: Array, padded: int, like: Tensor) -> Tensor:
    """The inverse of `_flat`, in the shape and dtype of ``like``."""
    rows = torch.from_numpy(flat).view(*like.shape[:-1], padded)
    return rows[..., : like.shape[-1]].to(like.dtype).contiguous()


def _once(x: Tensor) -> Tensor:
    """Expanded batch and head axes as axes of size 1, which kernels broadcast without a copy."""
    for axis in range(min(2, x.dim() - 1)):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


def _blocks(count: int, others: int) -> Iterator[tuple[int, int]]:
    """``count`` rows in blocks; as many tasks have ``others`` beside them, such as heads."""
    least, most = _ROWS_PER_TASK
    step = min(max(count * others // (_TASKS_PER_THREAD * torch.get_num_threads()), least), most)
    for start in range(0, count, step):
        yield start, min(start + step, count)


class _Call:
    """One call's arguments as the kernels take them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, scale: float, dropout_p: float, seed: int
    ) -> None:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.dtype = np.dtype(np.float64 if compute == torch.float64 else np.float32)
        self.lanes = LANES[self.dtype]
        self.scale = float(scale)
        width, value_width = self.padded(q.shape[-1]), self.padded(v.shape[-1])
        self.tables = Tables(_flat(q, width), _flat(k, width), _flat(v, value_width))
        self.batch, heads, queries, _ = q.shape
        kv_heads, keys = k.shape[1:3]
        # 2^32 steps of probability; a threshold of 0 means no dropout
        threshold = max(1, round(dropout_p * 2**32)) if dropout_p > 0.0 else 0
        self.dropout = Dropout(threshold, 1.0 / (1.0 - dropout_p), seed)

        def segments(x: Tensor | None) -> Array:
            return np.empty((0, 0), np.int64) if x is None else as_array(_once(x).long())

        neighbors = None if parts.neighbors is None else _once(parts.neighbors)
        bias = None if parts.bias is None else _once(parts.bias)
        if neighbors is not None and not neighbors.numel():
            neighbors = bias = None
        no_list = np.empty((0, 0), np.int32)
        self.graph = Graph(
            neighbors=no_list if neighbors is None else as_array(neighbors.int()).reshape(-1, neighbors.shape[-1]),
            bias=np.empty((0, 0), self.dtype)
            if bias is None
            else as_array(bias.to(compute)).reshape(-1, bias.shape[-1]),
            columns=np.empty(0, np.int32) if parts.columns is None else as_array(parts.columns.int()),
            key_keep=np.empty((0, 0), np.uint8)
            if parts.key_keep is None
            else as_array(_once(parts.key_keep)).view(np.uint8),
            query_segments=segments(parts.query_segments),
            key_segments=segments(parts.key_segments),
            before=parts.band_before,
            after=0 if parts.causal else parts.band_after,
            offset=parts.query_offset,
            causal=parts.causal,
        )
        self.shape = Shape(
            heads=heads,
            kv_heads=kv_heads,
            queries=queries,
            keys=keys,
            width=width,
            value_width=value_width,
            list_batches=1 if neighbors is None else neighbors.shape[0],
            list_heads=1 if neighbors is None else neighbors.shape[1],
            bias_batches=1 if bias is None else bias.shape[0],
            bias_heads=1 if bias is None else bias.shape[1],
        )
        band = min(keys, parts.band_before + parts.band_after + 1) if parts.has_band else 0
        self.most_edges = band + self.graph.columns.shape[0] + self.graph.neighbors.shape[1]

    def padded(self, width: int) -> int:
        return -(-width // self.lanes) * self.lanes

    def work(self, edges: int) -> Work:
        room = -(-max(edges, 1) // 16) * 16
        return Work(_aligned(room, np.int32), _aligned(room, np.int32), *(_aligned(room, self.dtype) for _ in range(4)))

    def row_tasks(self, count: int) -> list[tuple[int, int, int, int]]:
        """Batch element, KV head and block of rows of each task."""
        heads = [(b, h) for b in range(self.batch) for h in range(self.shape.kv_heads)]
        return [(b, h, start, stop) for b, h in heads for start, stop in _blocks(count, len(heads))]


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
    call = _Call(q, k, v, parts, scale, dropout_p, seed)
    out = _aligned(q.shape[:3].numel() * call.shape.value_width, call.dtype)
    lse = np.empty(q.shape[:3].numel(), call.dtype)
    tasks = call.row_tasks(call.shape.queries)

    def attend(task: int) -> None:
        work = call.work(call.most_edges)
        attend_rows(
            call.tables, call.graph, call.shape, call.dropout, call.scale, *tasks[task], work, out, lse
        )  # fmt: skip

    parallel_for(attend, len(tasks))
    like = q.new_empty((*q.shape[:3], v.shape[-1]))
    return _unflat(out, call.shape.value_width, like), torch.from_numpy(lse).view(q.shape[:3])


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
    call = _Call(q, k, v, parts, scale, dropout_p, seed)
    shape, graph, dtype = call.shape, call.graph, call.dtype
    d_out, flat_out = _flat(grad_out, shape.value_width), _flat(out, shape.value_width)
    row_lse = as_array(lse).reshape(-1)
    d_lse = as_array(grad_lse).astype(dtype, copy=False).reshape(-1)
    delta = np.empty_like(row_lse)
    grad_q, grad_k, grad_v = (_aligned(table.size, dtype) for table in call.tables)
    grad_bias = np.zeros_like(graph.bias)

    # whoever shares rows of the bias belongs to one task, which adds up their gradients
    own_batch = not graph.bias.shape[0] or shape.bias_batches == call.batch
    own_head = not graph.bias.shape[0] or shape.bias_heads == shape.heads
    owners = [
        (range(b, b + 1) if own_batch else range(call.batch), range(h, h + 1) if own_head else range(shape.kv_heads))
        for b in range(call.batch if own_batch else 1)
        for h in range(shape.kv_heads if own_head else 1)
    ]
    query_tasks = [(owner, block) for owner in owners for block in _blocks(shape.queries, len(owners))]

    def by_queries(task: int) -> None:
        (batches, heads), block = query_tasks[task]
        work = call.work(call.most_edges)
        for b in batches:
            for h in heads:
                query_gradients(
                    call.tables, flat_out, d_out, d_lse, row_lse, graph, shape, call.dropout, call.scale, b, h, *block,
                    work, grad_q, grad_bias, delta,
                )  # fmt: skip

    parallel_for(by_queries, len(query_tasks))
    is_column = np.zeros(shape.keys, np.bool_)
    is_column[graph.columns] = True
    reachable_lse = np.where(row_lse == -np.inf, np.array(np.inf, dtype), row_lse)
    # a few heads at a time, so that of the lists turned round only theirs exist
    pairs = [(b, h) for b in range(call.batch) for h in range(shape.kv_heads)]
    at_once = _pairs_at_once(call)
    for first in range(0, len(pairs), at_once):
        some = pairs[first : first + at_once]
        incoming = _invert(call, some)
        key_tasks = [(*pair, *block) for pair in some for block in _blocks(shape.keys, len(some))]

        def by_keys(task: int, incoming: Incoming = incoming, key_tasks: list[Any] = key_tasks) -> None:
            work = call.work(_INCOMING_AT_ONCE)
            key_gradients(
                call.tables, d_out, reachable_lse, delta, graph, incoming, is_column, shape, call.dropout, call.scale,
                *key_tasks[task], work, grad_k, grad_v,
            )  # fmt: skip

        parallel_for(by_keys, len(key_tasks))
    return (
        _unflat(grad_q, shape.width, q),
        _unflat(grad_k, shape.width, k),
        _unflat(grad_v, shape.value_width, v),
        _bias_gradient(grad_bias, parts.bias),
        torch.zeros((), dtype=lse.dtype),
        torch.zeros((), dtype=lse.dtype),
    )


def _lists_of(call: _Call, batch: int, kv_head: int) -> list[int]:
    """The lists that the query heads of a KV head go by."""
    shape = call.shape
    if not call.graph.neighbors.size:
        return []
    group = shape.heads // shape.kv_heads
    heads = range(kv_head * group, (kv_head + 1) * group)
    return sorted({int(list_of.py_func(shape, batch, head)) for head in heads})


def _pairs_at_once(call: _Call) -> int:
    """Batch elements × KV heads whose lists are turned round together: enough for all threads."""
    one = call.shape.queries * call.graph.neighbors.shape[1] * 4 * max(1, len(_lists_of(call, 0, 0)))
    return max(torch.get_num_threads(), _INVERTED_BYTES // max(1, one))


def _invert(call: _Call, pairs: list[tuple[int, int]]) -> Incoming:
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
    used = _once(bias)
    if not grad.size:
        return torch.zeros(bias.shape, dtype=torch.from_numpy(grad).dtype)
    # the gradient of an expanded bias, summed over what it is expanded to, may lie in any one of the copies
    result = torch.zeros(bias.shape, dtype=torch.from_numpy(grad).dtype)
    result[: used.shape[0], : used.shape[1]] = torch.from_numpy(grad).view(used.shape)
    return result
