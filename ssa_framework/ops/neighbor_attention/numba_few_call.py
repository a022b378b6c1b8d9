"""Few queries: their arguments as `numba_few` takes them, without a copy of the keys."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.numba_call import Call, aligned, flat, unflat
from ssa_framework.ops.neighbor_attention.numba_few import (
    FewWork,
    Listed,
    Rows,
    attend_few,
    collect_few,
    most_in_intervals,
)
from ssa_framework.ops.neighbor_attention.numba_rows import Array, Tables
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.numba_runtime import parallel_for
from ssa_framework.ops.numba_vectors import LANES

_FEW, _FEW_ON_VIEWS = 8, 64
"""Most queries that are attended by rows; more where the keys are a view, which other kernels would copy."""


def are_few(q: Tensor, k: Tensor) -> bool:
    """Whether the queries ``q [B, H, N, D]`` of keys ``k`` are few enough."""
    return q.numel() > 0 and k.numel() > 0 and q.shape[2] <= (_FEW if k.is_contiguous() else _FEW_ON_VIEWS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, *, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """See `ssa_framework.ops.neighbor_attention.numba_cpu.forward`."""
    dtype = np.dtype(np.float64 if q.dtype == torch.float64 else np.float32)
    batch, heads, queries, _ = q.shape
    width, value_width = (-(-x.shape[3] // LANES[dtype]) * LANES[dtype] for x in (q, v))
    rows_of_q = flat(q, width)
    call = Call(q, k, v, parts, scale, dropout_p, seed, tables=Tables(rows_of_q, *_no_rows(dtype)))
    most = call.most_edges + _most_in_parts(call)
    tasks = _shares(batch * heads)
    lines = batch * heads * queries
    listed = _no_lists(dtype)
    keys, values = _in_place(k, width, dtype), _in_place(v, value_width, dtype)
    if keys is not None and values is not None and keys[1] == values[1]:
        rows = Rows(keys[1], False)
        tables = Tables(rows_of_q, keys[0], values[0])
    else:  # converted or copied, but only what is attended to
        biases = np.zeros((lines if parts.bias is not None else 0, most), dtype)
        listed = Listed(np.zeros((lines, most), np.int32), biases, np.zeros(lines, np.int64))

        def collect(task: int) -> None:
            collect_few(call.parts, *tasks[task], _work(call, most), listed)

        parallel_for(collect, len(tasks))
        rows = Rows(int(listed.counts.max(initial=0)), True)
        edges = torch.from_numpy(listed.edges[:, : rows.per_head]).reshape(batch, heads, -1).long()
        tables = Tables(rows_of_q, flat(_rows_of(k, edges), width), flat(_rows_of(v, edges), value_width))
    lse = torch.empty((batch, heads, queries), dtype=call.compute)
    result = q.new_empty((batch, heads, queries, v.shape[3]))
    in_place = value_width == v.shape[3] and result.dtype == call.compute
    out = result.numpy().reshape(-1) if in_place else aligned(lines * value_width, dtype)

    sums = lse.numpy().reshape(-1)

    def attend(task: int) -> None:
        attend_few(tables, rows, call.parts, *tasks[task], _work(call, most), listed, out, sums)

    parallel_for(attend, len(tasks))
    return result if in_place else unflat(out, value_width, result), lse


@functools.cache
def _no_rows(dtype: Any) -> tuple[Array, Array]:
    return np.empty(0, dtype), np.empty(0, dtype)


@functools.cache
def _no_lists(dtype: Any) -> Listed:
    return Listed(np.empty((0, 0), np.int32), np.empty((0, 0), dtype), np.zeros(0, np.int64))


def _shares(heads: int) -> list[tuple[int, int]]:
    """Query heads of all batch elements, in equal shares for all threads: a call takes longer than a head."""
    count = min(heads, torch.get_num_threads())
    return [(i * heads // count, (i + 1) * heads // count) for i in range(count)]


def _in_place(x: Tensor, width: int, dtype: Any) -> tuple[Array, int] | None:
    """Rows ``[B, H, M, D]`` as one flat array and how many rows lie from one head to the next; ``None`` where they
    have to be copied."""
    _, heads, length, dim = x.shape
    over_batch, over_heads, over_rows, within = x.stride()
    even = (
        over_rows == dim
        and within == 1
        and over_heads % width == 0
        and (over_batch == heads * over_heads or len(x) == 1)
    )
    if dim != width or not even or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        return None
    extent = ((x.shape[0] * heads - 1) * over_heads) + length * dim
    return torch.as_strided(x.detach(), (extent,), (1,)).numpy(), over_heads // dim


def _rows_of(x: Tensor, keys: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]`` at ``keys [B, H, E]``: ``[B, H, E, D]``."""
    batch, heads, _ = keys.shape
    element = torch.arange(batch)[:, None, None]
    kv_head = (torch.arange(heads) * x.shape[1] // heads)[:, None]
    return x.detach()[element, kv_head, keys]


def _most_in_parts(call: Call) -> int:
    """The most keys in the span and the slices of a query, and summaries."""
    graph, slices, summaries = call.parts.graph, call.parts.slices, call.parts.summaries
    most = most_in_intervals(graph.span_start, graph.span_end, slices.start, slices.end)
    return int(most) + summaries.log_weight.shape[1] + 32  # up to whole vectors


def _work(call: Call, most: int) -> FewWork:
    room = -(-max(most, 1) // 16) * 16
    opened = np.zeros(call.parts.summaries.log_weight.shape[1], np.uint8)
    return FewWork(
        np.empty(room, np.int32), np.empty(room, np.int32), aligned(room, call.dtype), aligned(room, call.dtype), opened
    )
