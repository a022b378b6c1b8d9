"""Selection for few queries: one kernel call for all heads, and keys are looked up where they lie.

The other kernels first sort what the queries look into, so that many queries share a slice. Here a query collects the
keys of its slices, each once, and scores what it has. Scores are the same sums in the same order here and there, so
that decoding lists the keys that prefill lists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.numba_products import row_by_matrix
from ssa_framework.ops.numba_runtime import as_array, device_function, kernel, parallel_for
from ssa_framework.ops.numba_vectors import copy_numbers, lanes, transpose_tile
from ssa_framework.ops.select_neighbors.numba_choose import bitmap_size, mark_best, unpack
from ssa_framework.ops.select_neighbors.numba_ranges import STRIP, clip
from ssa_framework.ops.select_neighbors.types import Eligible
from ssa_framework.proposals import Ranges

MOST_QUERIES = 16
_LANES = 16


def are_few(q: Tensor, k: Tensor, eligible: Eligible) -> bool:
    """Whether these queries ``[B, G, N, D]`` are few, and the keys ``[B, Hkv, M, D]`` can stay where they are."""
    in_place = k.stride()[-2:] == (k.shape[-1], 1) and min(k.stride()) > 0 and k.dtype == q.dtype
    packed = eligible.mask.query_segments is not None
    return q.shape[2] <= MOST_QUERIES and in_place and not packed and k.dtype in (torch.float32, torch.float64)


def select_few(
    q: Tensor, k: Tensor, ranges: Ranges, eligible: Eligible, budget: int, longest: int, width: int
) -> tuple[Tensor, int, int]:
    """The best keys of slices.

    Args:
        longest: candidates of a query, at most, repeats included. width: slots of the result.

    Returns:
        int32 ``[B, G, N, width]``, how many slots are filled, how many distinct pairs were scored.
    """
    batch, heads, queries, dim = q.shape
    count = k.shape[2]
    neighbors = torch.full((batch, heads, queries, width), -1, dtype=torch.int32)
    extent = sum((size - 1) * stride for size, stride in zip(k.shape, k.stride(), strict=True)) + 1
    keys = torch.as_strided(k.detach(), (extent,), (1,)).numpy()
    order = torch.arange(count, dtype=torch.int32)[None, None, None] if ranges.order is None else ranges.order
    start, end = ranges.start, ranges.end
    if start is None or end is None:
        start = torch.zeros((1, 1, 1, order.shape[2], 1), dtype=torch.int32)
        end = torch.full_like(start, order.shape[3])
    mask, band, columns = eligible.mask, eligible.band, eligible.columns
    reach = np.array([band.before, band.after] if band is not None else [-1, -1], dtype=np.int64)
    covered = np.empty(0, np.int32) if columns is None else columns.contiguous().numpy()
    keep = np.empty((1, 0), np.bool_) if mask.key_keep is None else mask.key_keep.contiguous().numpy()
    tables = (
        as_array(q).reshape(-1), keys, np.array(k.stride()[:2], dtype=np.int64), heads // k.shape[1],
        order.contiguous().numpy(), start.contiguous().numpy(), end.contiguous().numpy(),
        mask.positions.contiguous().numpy(), mask.causal, ranges.limit or 0, reach, covered, keep, count,
    )  # fmt: skip
    shares = min(torch.get_num_threads(), batch * heads)
    totals = np.zeros((shares, 2), dtype=np.int64)
    found = neighbors.numpy()
    room = max(min(longest, count), width) + 2

    def share(task: int) -> None:
        first, last = (i * batch * heads // shares for i in (task, task + 1))
        _select(
            *tables, budget, first, last, np.zeros(count // 64 + 1, np.uint64), np.empty(room, np.int32),
            np.empty(room, keys.dtype), np.empty((dim + 1) * STRIP, keys.dtype),
            np.zeros(bitmap_size(count), np.uint64), found, totals[task],
        )  # fmt: skip

    parallel_for(share, shares)
    listed, scored = totals.sum(0).tolist()
    return neighbors, listed, scored


@kernel
def _select(
    q: Any, k: Any, apart: Any, group: int, order: Any, start: Any, end: Any, positions: Any, causal: bool, limit: int,
    band: Any, columns: Any, keep: Any, count: int, budget: int, first_task: int, last_task: int, seen: Any,
    picked: Any, scores: Any, work: Any, bits: Any, neighbors: Any, totals: Any,
) -> None:  # fmt: skip
    """The neighbors of all queries of the heads ``first_task .. last_task``, counted over all batch elements.

    Args:
        q: ``[B · G · N · D]``. k: the memory of the keys; apart: int64 ``[2]``, numbers from one batch element and one
            KV head to the next. group: graph heads per KV head.
        order: int32 ``[B or 1, G or 1, S, L]``. start, end: int32 ``[B or 1, G or 1, N or 1, S, P]``.
        positions: int32 ``[B or 1, N]``. band: int64 ``[2]``, before and after, -1 = none. columns: int32, ascending.
        keep: bool ``[B or 1, M or 0]``. count: M.
        seen: scratch, uint64 zeros, a bitmap of the keys. picked, scores: scratch, longer than a query has distinct
            candidates and than a row of ``neighbors``. work: scratch, ``[(D + 1)·STRIP]``. bits: scratch, uint64
            zeros, as in `choose_from_slices`.
        neighbors: out, int32 ``[B, G, N, K]``, filled with -1. totals: out, int64 ``[2]``: slots filled, keys scored.
    """
    heads, queries = neighbors.shape[1], neighbors.shape[2]
    dim = work.shape[0] // STRIP - 1
    strip, sums = work[: dim * STRIP], work[dim * STRIP :]
    words = count // 64 + 1
    for task in range(first_task, last_task):
        b, g = task // heads, task % heads
        base = b * apart[0] + g // group * apart[1]
        starts = start[b if start.shape[0] > 1 else 0, g if start.shape[1] > 1 else 0]
        ends = end[b if end.shape[0] > 1 else 0, g if end.shape[1] > 1 else 0]
        orders = order[b if order.shape[0] > 1 else 0, g if order.shape[1] > 1 else 0]
        mask = keep[b if keep.shape[0] > 1 else 0]
        for n in range(queries):
            position = positions[b if positions.shape[0] > 1 else 0, n]
            row = n if starts.shape[0] > 1 else 0
            _flip(columns, columns.shape[0], seen)
            found = _pick(orders, starts[row], ends[row], position, causal, limit, band, mask, count, seen, picked)
            _flip(columns, columns.shape[0], seen)
            _flip(picked, found, seen)
            for left in range(0, found, STRIP):
                size = min(STRIP, found - left)
                _transpose(k, base, dim, picked, left, size, strip)
                wide = (size + _LANES - 1) // _LANES * _LANES
                row_by_matrix(q, (task * queries + n) * dim, dim, strip, 0, STRIP, wide, sums, 0)
                copy_numbers(sums, 0, scores, left, size)
            real = 0
            for i in range(found):  # a NaN is above nothing: what cannot be compared is not listed
                picked[real], scores[real] = picked[i], scores[i]
                real += 1 if scores[i] > -np.inf else 0
            totals[1] += real
            totals[0] += mark_best(picked, scores, real, budget, bits, words)
            unpack(bits, words, picked, neighbors[b, g, n])


@device_function
def _flip(keys: Any, count: int, seen: Any) -> None:
    """Flip the bits of distinct keys."""
    for i in range(count):
        place = np.uint64(keys[i])
        seen[place >> np.uint64(6)] ^= np.uint64(1) << (place & np.uint64(63))


@device_function
def _pick(
    orders: Any, start: Any, end: Any, position: int, causal: bool, limit: int, band: Any, keep: Any, count: int,
    seen: Any, picked: Any,
) -> int:  # fmt: skip
    """The keys of the slices of a query that it may list, each once, whose bits are then set; returns how many."""
    last_key = position if causal else count
    low, high = (position - band[0], position + band[1]) if band[0] >= 0 else (count, -1)
    found = 0
    for s in range(orders.shape[0]):
        order = orders[s]
        for p in range(start.shape[1]):
            first, last = clip(order, start[s, p], end[s, p], position, causal, limit)
            for j in range(first, last):
                key = order[j]
                place = np.uint64(key)
                word, bit = place >> np.uint64(6), np.uint64(1) << (place & np.uint64(63))
                before = seen[word]
                if before & bit or key > last_key or low <= key <= high or (keep.shape[0] > 0 and not keep[key]):
                    continue
                seen[word] = before | bit
                picked[found] = key
                found += 1
    return found


@device_function
def _transpose(k: Any, base: int, dim: int, keys: Any, left: int, size: int, strip: Any) -> None:
    """The rows ``keys[left : left + size]`` as columns of ``strip [D, STRIP]``; columns up to a whole register hold
    some row."""
    width = lanes(k)
    whole = dim - dim % width
    for j in range(0, size, width):
        count = min(width, size - j)
        for d in range(0, whole, width):
            transpose_tile(k, base + d, dim, keys, left + j, count, strip, d * STRIP + j, STRIP)
        for t in range(width):
            row = keys[left + j + min(t, count - 1)]
            for d in range(whole, dim):
                strip[d * STRIP + j + t] = k[base + row * dim + d]
