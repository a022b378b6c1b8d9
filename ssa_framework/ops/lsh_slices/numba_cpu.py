"""CPU kernels: a task hashes, orders and looks up for one KV head and some of the hash functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.lsh_slices.numba_hash import center_rows, hash_keys, hash_queries, order_keys
from ssa_framework.ops.lsh_slices.numba_strips import scratch_of, strips_of
from ssa_framework.ops.lsh_slices.probing import flip_table
from ssa_framework.ops.lsh_slices.types import Family, HashLevels
from ssa_framework.ops.numba_runtime import Workspace, as_array, parallel_for

Array = np.ndarray[Any, Any]


def slices(
    q: Tensor, k: Tensor, directions: Tensor, family: Family, probes: int, levels: HashLevels, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ssa_framework.ops.lsh_slices.api.lsh_slices`."""
    batch, heads, keys, dim = k.shape
    functions = directions.shape[0]
    group = q.shape[1] // heads
    strips = strips_of(directions, family, levels.most, dim)
    tables = _Tables(levels)
    length = int((levels.last - levels.first + 1).clamp(min=0).sum(-1).max()) if keys else 0
    order = torch.zeros((batch, heads, functions, length), dtype=torch.int32)
    start = torch.empty((*q.shape[:3], functions, 1 + probes), dtype=torch.int32)
    end = torch.empty_like(start)
    q_array, k_array = as_array(q.float()), as_array(k.float())
    orders, starts, ends = order.numpy(), start.numpy(), end.numpy()
    flips = flip_table(probes, levels.most).numpy()
    # a task for all functions of a head centers its keys once; with few heads, tasks share them to keep threads busy
    parts = min(len(strips), -(-torch.get_num_threads() // max(1, batch * heads)))

    space = Workspace()

    def body(task: int) -> None:
        pair, part = divmod(task, parts)
        b, h = divmod(pair, heads)
        rows = k_array[b, h]
        keep, first, last, documents = tables.keys(b)
        if center:
            rows = space.array("rows", rows.size, rows.dtype).reshape(rows.shape)
            sums = np.empty((levels.num_documents, dim), dtype=np.float64)
            counts = np.empty(levels.num_documents, dtype=np.int64)
            center_rows(k_array[b, h], keep, documents, levels.causal, sums, counts, rows)
        cursor = np.empty(levels.num_buckets, dtype=np.int32)
        for number, hashes in strips[part::parts]:
            scratch = scratch_of(hashes.width, 1 + probes)
            variants = 1 if family == "hyperplane" else levels.most + 1
            codes = np.empty((hashes.functions, variants, keys), dtype=np.uint16)
            firsts = np.empty((hashes.functions, levels.num_buckets + 1), dtype=np.int32)
            hash_keys(rows, hashes, first, last, scratch, codes)
            for f in range(hashes.functions):
                order_keys(
                    codes[f], hashes.family, levels.most, first, last, documents, levels.num_documents, firsts[f],
                    cursor, orders[b, h, number + f],
                )  # fmt: skip
            for g in range(h * group, (h + 1) * group):
                hash_queries(
                    q_array[b, g], hashes, *tables.queries(b), levels.num_documents, flips, firsts, number, functions,
                    scratch, starts[b, g], ends[b, g],
                )  # fmt: skip

    parallel_for(body, batch * heads * parts)
    return order, start, end


class _Tables:
    """The levels as arrays, by batch element."""

    def __init__(self, levels: HashLevels) -> None:
        self._keep = _array(levels.key_keep, np.bool_)
        self._first, self._last = _array(levels.first, np.int32), _array(levels.last, np.int32)
        self._levels = _array(levels.queries, np.int32)
        self._key_documents = _array(levels.key_documents, np.int32)
        self._query_documents = _array(levels.query_documents, np.int32)

    def keys(self, b: int) -> tuple[Array, Array, Array, Array]:
        return (*(_row(x, b) for x in (self._keep, self._first, self._last, self._key_documents)),)  # type: ignore[return-value]

    def queries(self, b: int) -> tuple[Array, Array]:
        return _row(self._levels, b), _row(self._query_documents, b)


def _array(x: Tensor | None, dtype: Any) -> Array:
    return np.empty((1, 0), dtype) if x is None else np.ascontiguousarray(x.numpy(), dtype=dtype)


def _row(x: Array, b: int) -> Array:
    row: Array = x[b if x.shape[0] > 1 else 0]
    return row
