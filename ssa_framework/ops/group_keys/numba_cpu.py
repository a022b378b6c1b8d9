"""Grouping by a counting sort: two passes over the keys of an order, one over the queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.numba_runtime import kernel, parallel_for


@kernel
def _count_and_place(buckets: Any, num_buckets: int, firsts: Any, order: Any, cursor: Any) -> None:
    """``buckets`` integer ``[M]`` → ``firsts`` int32 ``[num_buckets + 1]``, ``order`` int32 ``[L]``."""
    firsts[:] = 0
    for m in range(buckets.shape[0]):
        if buckets[m] >= 0:
            firsts[buckets[m] + 1] += 1
    for i in range(num_buckets):
        firsts[i + 1] += firsts[i]
        cursor[i] = firsts[i]
    for m in range(buckets.shape[0]):
        bucket = buckets[m]
        if bucket >= 0:
            order[cursor[bucket]] = m
            cursor[bucket] += 1


@kernel
def _look_up(wanted: Any, firsts: Any, s: int, start: Any, end: Any) -> None:
    """``wanted`` integer ``[N, S, P]`` → ``start, end`` int32 of the same shape, for order s."""
    for n in range(wanted.shape[0]):
        for p in range(wanted.shape[2]):
            bucket = wanted[n, s, p]
            start[n, s, p] = firsts[bucket] if bucket >= 0 else 0
            end[n, s, p] = firsts[bucket + 1] if bucket >= 0 else 0


def group(key_buckets: Tensor, query_buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ssa_framework.ops.group_keys.api.group_keys`."""
    batch, heads, orders, _ = key_buckets.shape
    graph_heads = query_buckets.shape[1]
    group_size = graph_heads // heads
    longest = int((key_buckets >= 0).sum(-1).max()) if key_buckets.numel() else 0
    order = torch.zeros((batch, heads, orders, longest), dtype=torch.int32)
    start = torch.empty(query_buckets.shape, dtype=torch.int32)
    end = torch.empty(query_buckets.shape, dtype=torch.int32)
    of_keys, of_queries = key_buckets.contiguous().numpy(), query_buckets.contiguous().numpy()
    orders_out, starts, ends = order.numpy(), start.numpy(), end.numpy()

    def body(number: int) -> None:
        b, h = divmod(number, heads)
        firsts = np.empty(num_buckets + 1, dtype=np.int32)
        cursor = np.empty(num_buckets, dtype=np.int32)
        for s in range(orders):
            _count_and_place(of_keys[b, h, s], num_buckets, firsts, orders_out[b, h, s], cursor)
            for g in range(h * group_size, (h + 1) * group_size):
                _look_up(of_queries[b, g], firsts, s, starts[b, g], ends[b, g])

    parallel_for(body, batch * heads)
    return order, start, end
