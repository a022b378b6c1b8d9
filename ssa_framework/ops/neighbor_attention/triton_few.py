"""Forward kernels for few queries: what one of them attends to is shared out among many programs.

A program for each query and list head leaves most of a GPU idle, and reads a long cache through one multiprocessor.
Here the keys and the summaries of a query stand one behind the other, whatever part of the graph they belong to;
every program takes an equal share of them and leaves a partial output with its log-sum-exp, and a second launch merges
these (split-K attention, as in Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ssa_framework.ops.neighbor_attention.triton_tiles import (
    LN_2,
    LOG2_E,
    band_of,
    first_columns,
    fixed_keys,
    gather,
    listed_keys,
    load_heads,
    products,
    sliced_keys,
    slices_of,
    unmasked,
    weighted_sum,
)


class Partials(NamedTuple):
    """Of every share of a query: ``out`` float32 ``[B, H, N, shares, WV]``, and ``lse`` float32 ``[B, H, N, shares]``,
    in powers of 2; a share that holds nothing has ``lse`` -inf and no ``out``."""

    out: Any
    lse: Any


class Positions(NamedTuple):
    """Where the queries stand, int32 ``[B, N]``: in memory, so that a captured launch serves the next token too."""

    pointer: Any
    batch: Any
    row: Any


@triton.jit
def _attend(
    keys, x, weights, m, total, acc, k, v, k_start, v_start, scale,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    PADDED: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (in powers of 2) over rows ``keys [S]`` of a table, -1 = none; ``weights [S]`` or
    ``None`` are added to the scores."""
    # both on their way before either is used; summaries are rounded like keys
    key_tile = gather(k_start, keys, k, K_ROW, D, W).to(x.dtype)
    value_tile = gather(v_start, keys, v, V_ROW, DV, WV).to(x.dtype)
    # [S, PADDED]
    s = products(key_tile, x, PADDED, PRECISION) * scale
    if weights is not None:
        s += weights[:, None]
    s = tl.where((keys >= 0)[:, None], s, -float("inf"))
    # [1, PADDED]
    new_m = tl.maximum(m, tl.max(s, 0, keep_dims=True))
    # no key so far: subtract 0, so that the weights are exp(-inf) = 0, not NaN
    finite = tl.where(new_m == -float("inf"), 0.0, new_m)
    p = tl.exp2(s - finite)
    keep = tl.exp2(m - finite)
    total = total * keep + tl.sum(p, 0, keep_dims=True)
    acc = weighted_sum(value_tile, p, acc * keep, PADDED, FP32, PRECISION)
    return new_m, total, acc


@triton.jit
def _share_of(begin, end, before, count):
    """The part of ``count`` slots behind ``before`` others that lies in ``[begin, end)``, as first and one past the
    last of these slots."""
    first = tl.minimum(tl.maximum(begin - before, 0), count)
    return first, tl.maximum(tl.minimum(end - before, count), first)


@triton.jit
def _level_of(seen, level, batch, row):
    """First summary of a level that a query sees, and how many."""
    at = batch * seen.batch + row * seen.row + level * seen.level
    first = tl.maximum(tl.load(seen.first + at), 0)
    return first, tl.maximum(tl.minimum(tl.load(seen.stop + at), seen.length) - first, 0)


@triton.jit
def attend_few_kernel(
    q, k, v, summary_k, summary_v, partials, positions, fixed, lists, slices, seen, num_keys, scale,
    SHARES: tl.constexpr, HEADS: tl.constexpr, KV_SHARE: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, SUMMARY_K_ROW: tl.constexpr, SUMMARY_V_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, PADDED: tl.constexpr,
    SLOTS: tl.constexpr, SLICES: tl.constexpr, OPENED: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Share ``program_id(0) % SHARES`` of query ``program_id(0) // SHARES``, list head ``program_id(1)``: ``HEADS``
    query heads with one graph; ``KV_SHARE`` list heads share a key/value head.

    The slots of a query: band and columns, list, slices, span, and the summaries of all levels.
    """
    share = tl.program_id(0) % SHARES
    row = tl.program_id(0) // SHARES
    queries = tl.num_programs(0) // SHARES
    list_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = list_head // KV_SHARE
    head = list_head * HEADS
    position = tl.load(positions.pointer + batch * positions.batch + row * positions.row)

    # how many slots each part has
    fixed_slots = row * 0
    first, last = band_of(fixed, position, num_keys)
    if FIXED:
        fixed_slots += tl.maximum(last - first + 1, 0) + fixed.num_columns
    listed = row * 0
    if lists.pointer is not None:
        listed += lists.slots
    sliced = row * 0
    if slices.start is not None:
        slice_end, shift, sliced = slices_of(slices, batch, list_head, row, SLICES)
    low = row * 0
    spanned = row * 0
    if fixed.span_start is not None:
        at = batch * fixed.span_batch + row * fixed.span_row
        low = tl.maximum(tl.load(fixed.span_start + at), 0)
        high = tl.minimum(tl.load(fixed.span_end + at), num_keys)
        if CAUSAL:
            high = tl.minimum(high, position + 1)
        spanned = tl.maximum(high - low, 0)
    summarised = row * 0
    if seen.first is not None:
        for level in range(seen.levels):
            _, count = _level_of(seen, level, batch, row)
            summarised += count
    before_slices = fixed_slots + listed
    before_span = before_slices + sliced
    before_summaries = before_span + spanned
    slots_of_share = tl.cdiv(before_summaries + summarised, SHARES * SLOTS) * SLOTS
    begin = share * slots_of_share
    end = begin + slots_of_share

    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    # [W, PADDED], or [1, W]
    x = load_heads(q, batch, head, row.to(tl.int64), HEADS, PADDED, D, W)
    m = tl.full((1, PADDED), -float("inf"), tl.float32)
    total = tl.zeros((1, PADDED), tl.float32)
    acc = tl.zeros((1, WV) if PADDED == 1 else (WV, PADDED), tl.float32)
    scale = scale * LOG2_E
    number = tl.arange(0, SLOTS)
    if FIXED:
        from_slot, to_slot = _share_of(begin, end, row * 0, fixed_slots)
        for start in range(from_slot, to_slot, SLOTS):
            slots = start + number
            keys = fixed_keys(fixed, batch, row, position, first, last, slots, CAUSAL)
            keys = tl.where(slots < to_slot, keys, -1)
            m, total, acc = _attend(
                keys, x, None, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
    if lists.pointer is not None:
        of_query = lists.pointer + batch * lists.batch + list_head * lists.head + row.to(tl.int64) * lists.row
        from_slot, to_slot = _share_of(begin, end, fixed_slots, listed)
        for start in range(from_slot, to_slot, SLOTS):
            keys = tl.where(start + number < to_slot, listed_keys(of_query, lists, start, SLOTS), -1)
            m, total, acc = _attend(
                keys, x, None, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
    if slices.start is not None:
        order = slices.order + batch * slices.order_batch + list_head * slices.order_head
        columns = first_columns(fixed)
        from_slot, to_slot = _share_of(begin, end, before_slices, sliced)
        for start in range(from_slot, to_slot, SLOTS):
            slots = start + number
            keys = sliced_keys(
                order, slices, fixed, columns, batch, row, position, slice_end, shift, sliced, slots, num_keys,
                SLICES, CAUSAL,
            )  # fmt: skip
            keys = tl.where(slots < to_slot, keys, -1)
            m, total, acc = _attend(
                keys, x, None, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
    if fixed.span_start is not None:
        from_slot, to_slot = _share_of(begin, end, before_span, spanned)
        for start in range(from_slot, to_slot, SLOTS):
            keys = low + start + number
            inside = unmasked(fixed, batch, keys, row, start + number < to_slot)
            m, total, acc = _attend(
                tl.where(inside, keys, -1), x, None, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
    if seen.first is not None:
        k_start = summary_k.pointer + batch * summary_k.batch + kv_head * summary_k.head
        v_start = summary_v.pointer + batch * summary_v.batch + kv_head * summary_v.head
        weights_start = seen.weights + batch * seen.weights_batch + kv_head * seen.weights_head
        opened = tl.full((OPENED,), -1, tl.int32)
        if seen.opened is not None:
            slot = tl.arange(0, OPENED)
            of_head = batch * seen.opened_batch + kv_head * seen.opened_kv_head
            of_head += (list_head % KV_SHARE) * seen.opened_member + row.to(tl.int64) * seen.opened_row
            opened = tl.load(seen.opened + of_head + slot * seen.opened_slot, mask=slot < seen.opened_slots, other=-1)
        before = before_summaries
        for level in range(seen.levels):
            first_seen, count = _level_of(seen, level, batch, row)
            from_slot, to_slot = _share_of(begin, end, before, count)
            for start in range(from_slot, to_slot, SLOTS):
                numbers = first_seen + start + number
                inside = start + number < to_slot
                weights = (
                    tl.load(weights_start + numbers * seen.weights_number, mask=inside, other=-float("inf")) * LOG2_E
                )
                is_opened = tl.max((opened[:, None] == numbers[None, :]).to(tl.int32), 0) > 0
                # one without keys is not worth a row
                inside = inside & (weights > -float("inf")) & (is_opened == 0)
                m, total, acc = _attend(
                    tl.where(inside, numbers, -1), x, weights, m, total, acc, summary_k, summary_v, k_start, v_start,
                    scale, SUMMARY_K_ROW, SUMMARY_V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
                )  # fmt: skip
            before += count

    empty = m == -float("inf")
    total = tl.where(empty, 1.0, total)
    acc = acc / total
    heads = tl.arange(0, PADDED).to(tl.int64)
    dims = tl.arange(0, WV)
    # [PADDED]
    line = ((batch * tl.num_programs(1) * HEADS + head + heads) * queries + row) * SHARES + share
    real = (heads < HEADS) & (tl.reshape(empty, (PADDED,)) == 0)
    if PADDED == 1:
        tl.store(partials.out + line[:, None] * WV + dims[None, :], acc, mask=real[:, None])
    else:
        tl.store(partials.out + line[None, :] * WV + dims[:, None], acc, mask=real[None, :])
    tl.store(partials.lse + line, tl.reshape(m + tl.log2(total), (PADDED,)), mask=heads < HEADS)


@triton.jit
def merge_few_kernel(partials, out, lse, DV: tl.constexpr, WV: tl.constexpr, SHARES: tl.constexpr):
    """``out [B, H, N, DV]`` and ``lse [B, H, N]`` of query ``program_id(0)``, head ``program_id(1)``, from all
    shares."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    line = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + row) * SHARES
    share = tl.arange(0, SHARES)
    dims = tl.arange(0, WV)
    sums = tl.load(partials.lse + line + share)
    some = sums > -float("inf")
    m = tl.max(sums, 0)
    finite = tl.where(m == -float("inf"), 0.0, m)
    weights = tl.exp2(sums - finite)
    # [SHARES, WV]; a share without keys wrote nothing
    parts = tl.load(partials.out + (line + share)[:, None] * WV + dims[None, :], mask=some[:, None], other=0.0)
    total = tl.sum(weights, 0)
    total = tl.where(m == -float("inf"), 1.0, total)
    mean = tl.sum(parts * weights[:, None], 0) / total
    at = out.pointer + batch * out.batch + head * out.head + row.to(tl.int64) * out.row
    tl.store(at + dims * out.dim, mean.to(out.pointer.dtype.element_ty), mask=dims < DV)
    tl.store(lse.pointer + batch * lse.batch + head * lse.head + row * lse.row, (m + tl.log2(total)) * LN_2)
