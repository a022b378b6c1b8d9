"""CPU kernels for keys that are kept: hash those that are new, order them by bucket, look queries up among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.lsh_slices.numba_hash import Functions, add_row, center_row, key_code, probe
from ssa_framework.ops.lsh_slices.numba_strips import one_strip, scratch_of
from ssa_framework.ops.lsh_slices.probing import flip_table
from ssa_framework.ops.numba_products import row_by_matrix
from ssa_framework.ops.numba_runtime import as_array, as_matrices, bare_kernel, device_function, parallel_for
from ssa_framework.ops.numba_vectors import copy_numbers

if TYPE_CHECKING:
    from ssa_framework.ops.lsh_slices.kept import Buckets, KeptHashes

_BLOCK = 32
"""Codes that are compared before a look at which of them it was."""


def hash_new(
    kept: KeptHashes, k: Tensor, keep: Tensor | None, directions: Tensor, elements: Sequence[int], begin: int,
    first_new: int, bits: int,
) -> None:  # fmt: skip
    """See `KeptHashes._hash`."""
    batch, heads, length, dim = k.shape
    hashes = _functions(kept, directions, bits)
    rows = as_matrices(k[:, :, begin:].float())
    codes = kept.codes_room().numpy().view(np.uint16)
    pairs = np.array([b * heads + h for b in elements for h in range(heads)], dtype=np.int64)
    padding = _mask(keep)
    sums, counts = kept.sums.numpy().reshape(batch * heads, dim), kept.counts.numpy().reshape(batch * heads)
    saved_sums, saved_counts = kept.saved_rooms()
    saved = saved_sums.numpy(), saved_counts.numpy()
    shares = min(torch.get_num_threads(), len(pairs))

    def share(task: int) -> None:
        mine = pairs[task * len(pairs) // shares : (task + 1) * len(pairs) // shares]
        scratch, row = scratch_of(hashes.width, 1), np.empty(dim, dtype=np.float32)
        _hash_rows(
            rows, padding, begin, first_new, length, mine, heads, hashes, bits, kept.center, kept.save_every, sums,
            counts, *saved, row, scratch, codes,
        )  # fmt: skip

    parallel_for(share, shares)


def order_codes(
    kept: KeptHashes, keep: Tensor | None, elements: Sequence[int], bits: int, stored: int, length: int,
    order: Tensor, firsts: Tensor,
) -> None:  # fmt: skip
    """See `KeptHashes._order`."""
    heads, functions = kept.heads, kept.functions
    codes, padding = kept.codes_room().numpy().view(np.uint16), _mask(keep)
    orders, starts = order.numpy(), firsts.numpy()

    def of_function(task: int) -> None:
        number, f = divmod(task, functions)
        b, h = elements[number // heads], number % heads
        cursor = np.empty(1 << bits, dtype=np.int32)
        row = padding[b if padding.shape[0] > 1 else 0]
        _order_row(
            codes[b, h, f], row, length, stored - bits, starts[b, h, f, : (1 << bits) + 1], cursor, orders[b, h, f]
        )

    parallel_for(of_function, len(elements) * heads * functions)


def look_up(
    kept: KeptHashes, q: Tensor, keep: Tensor | None, directions: Tensor, elements: Sequence[int], bits: int,
    stored: int, first_query: int, limit: int, buckets: Buckets | None, lists: Tensor | None, start: Tensor,
    end: Tensor,
) -> None:  # fmt: skip
    """See `KeptHashes._look_up`."""
    batch, heads, queries, dim = q.shape
    slices = start.shape[4]
    hashes = _functions(kept, directions, stored)
    flips = flip_table(slices - 1, kept.max_bits).numpy()
    rows = as_array(q.float()).reshape(-1)
    codes, padding = kept.codes_room().numpy().view(np.uint16), _mask(keep)
    shape = (batch, heads, kept.functions, 0)
    found = np.empty(shape, np.int32) if lists is None else lists.numpy()
    if buckets is None:
        covered, order, firsts = 0, np.empty(shape, np.int32), np.empty(shape, np.int32)
    else:
        covered, order, firsts = buckets.covered, buckets.order.numpy(), buckets.firsts.numpy()
    tasks = np.array([b * heads + g for b in elements for g in range(heads)], dtype=np.int64)
    starts, ends = start.numpy(), end.numpy()
    shares = min(torch.get_num_threads(), len(tasks))

    def share(task: int) -> None:
        mine = tasks[task * len(tasks) // shares : (task + 1) * len(tasks) // shares]
        _look_up_rows(
            rows, queries, dim, mine, heads, heads // kept.heads, hashes, flips, bits, stored - bits, first_query,
            padding, codes, covered, order, firsts, limit, scratch_of(hashes.width, slices), found, starts, ends,
        )  # fmt: skip

    parallel_for(share, shares)


def _functions(kept: KeptHashes, directions: Tensor, bits: int) -> Functions:
    """All functions in one strip, which is kept."""
    if bits not in kept.strips:
        kept.strips[bits] = one_strip(directions, kept.family, bits, directions.shape[2])
    functions: Functions = kept.strips[bits]
    return functions


def _mask(keep: Tensor | None) -> Any:
    return np.empty((1, 0), np.bool_) if keep is None else keep.numpy()


@bare_kernel
def _hash_rows(
    k: Any, keep: Any, begin: int, first_new: int, length: int, pairs: Any, heads: int, hashes: Any, bits: int,
    center: bool, save_every: int, sums: Any, counts: Any, saved_sums: Any, saved_counts: Any, row: Any, scratch: Any,
    codes: Any,
) -> None:  # fmt: skip
    """Add the keys from ``begin`` on to their sums, and hash those from ``first_new`` on.

    Args:
        k: float32 ``[B, Hkv, length - begin, D]``. keep: bool ``[B or 1, length or 0]``.
        pairs: int64, number of the batch element times ``heads`` plus number of the head.
        sums, counts: float64 ``[B · Hkv, D]`` and int64 ``[B · Hkv]``, of the keys before ``begin``.
        saved_sums, saved_counts: out, float64 ``[B, Hkv, C, D]`` and int64 ``[B, Hkv, C]``, of the keys before every
            ``save_every``-th one. row: scratch, float32 ``[D]``.
        codes: out, uint16 ``[B, Hkv, S, room]``.
    """
    dim = row.shape[0]
    for i in range(pairs.shape[0]):
        pair = pairs[i]
        b, h = pair // heads, pair % heads
        for m in range(begin, length):
            if center and m % save_every == 0:
                saved_counts[b, h, m // save_every] = counts[pair]
                for d in range(dim):
                    saved_sums[b, h, m // save_every, d] = sums[pair, d]
            if keep.shape[1] > 0 and not keep[b if keep.shape[0] > 1 else 0, m]:
                continue
            if center:
                counts[pair] += 1
                add_row(k[b, h, m - begin], sums[pair])
            if m < first_new or bits == 0:
                continue
            if center:
                center_row(k[b, h, m - begin], sums[pair], counts[pair], row)
            else:
                for d in range(dim):
                    row[d] = k[b, h, m - begin, d]
            row_by_matrix(row, 0, dim, hashes.strip, 0, hashes.width, hashes.width, scratch.sums, 0)
            for f in range(hashes.functions):
                codes[b, h, f, m] = key_code(scratch, f * hashes.columns, hashes, bits)


@bare_kernel
def _order_row(codes: Any, keep: Any, length: int, shift: int, firsts: Any, cursor: Any, order: Any) -> None:
    """The first ``length`` keys by ``codes >> shift``, a counting sort.

    Args:
        codes: uint16 ``[room]``. keep: bool ``[length or 0]``. firsts: out, int32 ``[buckets + 1]``. cursor: scratch,
            int32 ``[buckets]``. order: out, int32 ``[length]``.
    """
    firsts[:] = 0
    for m in range(length):
        if keep.shape[0] == 0 or keep[m]:
            firsts[(codes[m] >> shift) + 1] += 1
    for i in range(cursor.shape[0]):
        firsts[i + 1] += firsts[i]
        cursor[i] = firsts[i]
    for m in range(length):
        if keep.shape[0] == 0 or keep[m]:
            bucket = codes[m] >> shift
            order[cursor[bucket]] = m
            cursor[bucket] += 1


@bare_kernel
def _look_up_rows(
    q: Any, queries: int, dim: int, tasks: Any, heads: int, group: int, hashes: Any, flips: Any, bits: int, shift: int,
    first_query: int, keep: Any, codes: Any, covered: int, order: Any, firsts: Any, limit: int, scratch: Any,
    lists: Any, start: Any, end: Any,
) -> None:  # fmt: skip
    """The slices of the queries, of a list of their own or, if ``lists`` has no room, of the order of the keys.

    Args:
        q: float32 ``[B · G · N · D]``. tasks: int64, number of the batch element times ``heads`` plus number of the
            graph head. group: graph heads per KV head. flips: int64 ``[most + 1, probes]``.
        first_query: position of the first query; the others follow. keep: bool ``[B or 1, M or 0]``.
        codes: uint16 ``[B, Hkv, S, room]``. order, firsts: int32 ``[B, Hkv, S, ..]``, of the keys before ``covered``.
        lists: out, int32 ``[B, G, S, N · P · limit or 0]``. start, end: out, int32 ``[B, G, N, S, P]``.
    """
    slices = start.shape[4]
    for i in range(tasks.shape[0]):
        task = tasks[i]
        b, g = task // heads, task % heads
        h, mask = g // group, keep[b if keep.shape[0] > 1 else 0]
        for n in range(queries):
            at = (task * queries + n) * dim
            row_by_matrix(q, at, dim, hashes.strip, 0, hashes.width, hashes.width, scratch.sums, 0)
            for f in range(hashes.functions):
                found = probe(scratch, f * hashes.columns, hashes, bits, flips, slices)
                for p in range(found):
                    code = scratch.codes[0, p]
                    low, high = 0, 0
                    if covered > 0:
                        low, high = firsts[b, h, f, code], firsts[b, h, f, code + 1]
                    if lists.shape[3] > 0:
                        stop = (n * slices + p + 1) * limit
                        low = _collect(
                            codes[b, h, f], mask, code, shift, first_query + n, covered, order[b, h, f], low, high,
                            lists[b, g, f], stop - limit, stop,
                        )  # fmt: skip
                        high = stop
                    start[b, g, n, f, p], end[b, g, n, f, p] = low, high
                for p in range(found, slices):
                    start[b, g, n, f, p], end[b, g, n, f, p] = 0, 0


@device_function
def _collect(
    codes: Any, keep: Any, code: int, shift: int, position: int, covered: int, order: Any, low: int, high: int,
    out: Any, begin: int, end: int,
) -> int:  # fmt: skip
    """The latest members of a bucket up to ``position``, to ``out[.. : end]``, not below ``begin``; returns where they
    begin. Those before ``covered`` are ``order[low:high]``."""
    place = end
    last = position
    while last >= covered and place > begin:
        first = max(last - _BLOCK + 1, covered)
        some = 0
        for m in range(first, last + 1):
            some += 1 if (codes[m] >> shift) == code else 0
        if some > 0:
            for m in range(last, first - 1, -1):
                if (codes[m] >> shift) == code and place > begin and (keep.shape[0] == 0 or keep[m]):
                    place -= 1
                    out[place] = m
        last = first - 1
    taken = min(place - begin, high - low)
    if taken > 0:
        place -= taken
        copy_numbers(order, high - taken, out, place, taken)
    return place
