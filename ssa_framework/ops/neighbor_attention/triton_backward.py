"""Backward kernels: gradients of queries, query by query, and of keys and values, block of keys by block of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.neighbor_attention.triton_tiles import (
    LOG2_E,
    band_of,
    first_columns,
    fixed_keys,
    gather,
    kept_pairs,
    listed_keys,
    load_heads,
    products,
    rows_of,
    sliced_keys,
    slices_of,
    weighted_sum,
)
from ssa_framework.ops.triton_runtime import dot


@triton.jit
def _query_step(
    keys, x, dx, row_lse, delta, acc, k, v, k_start, v_start, scale,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the queries through ``keys [S]`` to ``acc``."""
    # both on their way before either is used
    key_tile = gather(k_start, keys, k, K_ROW, D, W)
    value_tile = gather(v_start, keys, v, V_ROW, DV, WV)
    # [S, PADDED]
    s = products(key_tile, x, PADDED, PRECISION) * scale
    p = tl.exp2(tl.where((keys >= 0)[:, None], s - row_lse, -float("inf")))
    dp = products(value_tile, dx, PADDED, PRECISION)
    return weighted_sum(key_tile, p * (dp - delta), acc, PADDED, False, PRECISION)


@triton.jit
def query_gradient_kernel(
    grad_out, grad_lse, q, k, v, out, lse, grad_q, statistics, partial, fixed, lists, slices, num_queries, num_keys,
    scale,
    HEADS: tl.constexpr, KV_SHARE: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
    WV: tl.constexpr, PADDED: tl.constexpr,
    SLOTS: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad_q`` and ``statistics``; programs as in `attend_kernel`.

    ``partial``: `Rows`, float32, what the intervals gave, before the scale; its pointer is ``None`` without them.
    ``statistics``: float32 ``[B, Hkv, N, GROUP, 2]``, each row's lse (in powers of 2) and delta, which its ``dp`` is
    compared with: what a block of keys needs to know of a query lies in one place.
    """
    row = tl.program_id(0)
    list_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = list_head // KV_SHARE
    head = list_head * HEADS
    long_row = row.to(tl.int64)
    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    # [W, PADDED], or [1, W]
    x = load_heads(q, batch, head, long_row, HEADS, PADDED, D, W)
    # [WV, PADDED], or [1, WV]
    dx = load_heads(grad_out, batch, head, long_row, HEADS, PADDED, DV, WV)
    y = load_heads(out, batch, head, long_row, HEADS, PADDED, DV, WV)
    # [1, PADDED]
    heads = tl.arange(0, PADDED)[None, :].to(tl.int64)
    mine = heads < HEADS
    lse_at = lse.pointer + batch * lse.batch + (head + heads) * lse.head + long_row * lse.row
    grad_lse_at = grad_lse.pointer + batch * grad_lse.batch + (head + heads) * grad_lse.head + long_row * grad_lse.row
    delta = tl.sum(dx.to(tl.float32) * y.to(tl.float32), 1 if PADDED == 1 else 0, keep_dims=True)
    delta -= tl.load(grad_lse_at, mask=mine, other=0.0)
    row_lse = tl.load(lse_at, mask=mine, other=0.0) * LOG2_E
    # a query without neighbors: its weights are exp(-huge) = 0
    row_lse = tl.where(row_lse == -float("inf"), 1e30, row_lse)
    group_row = (batch * (tl.num_programs(1) // KV_SHARE) + kv_head) * num_queries + row
    place = statistics + ((group_row * KV_SHARE + list_head % KV_SHARE) * HEADS + heads) * 2
    tl.store(place, row_lse, mask=mine)
    tl.store(place + 1, delta, mask=mine)
    if partial.pointer is None:
        acc = tl.zeros(x.shape, tl.float32)
    else:
        acc = load_heads(partial, batch, head, long_row, HEADS, PADDED, D, W)

    # lists and slices go on where the last step of band and columns has room
    list_start = lists.pointer
    begin = 0
    if lists.pointer is not None:
        list_start += batch * lists.batch + list_head * lists.head + long_row * lists.row
    if slices.start is not None:
        after, shift, sliced = slices_of(slices, batch, list_head, row, SLICES)
        columns = first_columns(fixed)
        order = slices.order + batch * slices.order_batch + list_head * slices.order_head
    position = row + fixed.offset
    if FIXED:
        first, last = band_of(fixed, position, num_keys)
        count = tl.maximum(last - first + 1, 0) + fixed.num_columns
        begin = tl.cdiv(count, SLOTS) * SLOTS - count
        for start in range(0, count, SLOTS):
            slots = start + tl.arange(0, SLOTS)
            keys = fixed_keys(fixed, batch, row, position, first, last, slots, CAUSAL)
            if lists.pointer is not None:
                keys = tl.where(slots < count, keys, listed_keys(list_start, lists, start - count, SLOTS))
            elif slices.start is not None:
                slots -= count
                others = sliced_keys(
                    order, slices, fixed, columns, batch, row, position, after, shift, sliced, slots, num_keys,
                    SLICES, CAUSAL,
                )  # fmt: skip
                keys = tl.where(slots < 0, keys, others)
            acc = _query_step(
                keys, x, dx, row_lse, delta, acc, k, v, k_start, v_start, scale * LOG2_E,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, PRECISION,
            )  # fmt: skip
    if lists.pointer is not None:
        keys = listed_keys(list_start, lists, begin, SLOTS)
        for start in range(begin, lists.slots, SLOTS):
            # read ahead, so that a step does not begin with waiting for its own keys
            next_keys = listed_keys(list_start, lists, start + SLOTS, SLOTS)
            acc = _query_step(
                keys, x, dx, row_lse, delta, acc, k, v, k_start, v_start, scale * LOG2_E,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, PRECISION,
            )  # fmt: skip
            keys = next_keys
    if slices.start is not None:
        if lists.pointer is not None:
            begin = 0
        slots = begin + tl.arange(0, SLOTS)
        keys = sliced_keys(
            order, slices, fixed, columns, batch, row, position, after, shift, sliced, slots, num_keys,
            SLICES, CAUSAL,
        )  # fmt: skip
        for start in range(begin, sliced, SLOTS):
            slots = start + SLOTS + tl.arange(0, SLOTS)
            next_keys = sliced_keys(
                order, slices, fixed, columns, batch, row, position, after, shift, sliced, slots, num_keys,
                SLICES, CAUSAL,
            )  # fmt: skip
            acc = _query_step(
                keys, x, dx, row_lse, delta, acc, k, v, k_start, v_start, scale * LOG2_E,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, PRECISION,
            )  # fmt: skip
            keys = next_keys

    dims = tl.arange(0, W)
    acc = (acc * scale).to(grad_q.pointer.dtype.element_ty)
    start = grad_q.pointer + batch * grad_q.batch + head * grad_q.head + long_row * grad_q.row
    if PADDED == 1:
        tl.store(start + dims[None, :], acc, mask=dims[None, :] < D)
    else:
        tl.store(start + heads * grad_q.head + dims[:, None], acc, mask=(dims[:, None] < D) & mine)


@triton.jit
def key_step(
    row, head, allowed, weight, key_tile, value_tile, acc_k, acc_v, q, q_start, grad_out, grad_start, statistics,
    scale, GROUP: tl.constexpr, Q_ROW: tl.constexpr, GRAD_ROW: tl.constexpr, OFFSET: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries ``row [R]`` of heads ``head [R]`` (-1 = none) give to keys ``[S]``; ``allowed [S, R]``.

    ``weight [S]``: added to their scores, in powers of 2; or ``None``.
    """
    inside = head >= 0
    # [R, W], [R, WV]
    x = rows_of(q_start, q, row, head, Q_ROW, D, W, OFFSET)
    dx = rows_of(grad_start, grad_out, row, head, GRAD_ROW, DV, WV, OFFSET)
    place = statistics + (row.to(OFFSET) * GROUP + head) * 2
    row_lse = tl.load(place, mask=inside, other=0.0)
    delta = tl.load(place + 1, mask=inside, other=0.0)
    # [S, R]
    s = dot(key_tile, tl.trans(x), tl.zeros(allowed.shape, tl.float32), PRECISION) * scale
    if weight is not None:
        s += weight[:, None]
    p = tl.exp2(tl.where(allowed & inside[None, :], s - row_lse[None, :], -float("inf")))
    dp = dot(value_tile, tl.trans(dx), tl.zeros(allowed.shape, tl.float32), PRECISION)
    ds = p * (dp - delta[None, :])
    # [S, W], [S, WV]
    acc_k = dot(ds.to(x.dtype), x, acc_k, PRECISION)
    acc_v = dot(p.to(dx.dtype), dx, acc_v, PRECISION)
    return acc_k, acc_v


@triton.jit
def key_gradient_kernel(
    grad_out, q, k, v, statistics, grad_k, grad_v, fixed, starts, queries, masks, list_batches, list_heads, blocks,
    sum_k, sum_v, first_row, end_row,
    column_grad_k, column_grad_v, span_grad_k, span_grad_v, place_grad_k, place_grad_v, places, place_starts,
    order_batches, order_heads, num_places, num_queries, num_keys, scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, Q_ROW: tl.constexpr, GRAD_ROW: tl.constexpr, OFFSET: tl.constexpr,
    SHARE: tl.constexpr, SHARE_PADDED: tl.constexpr, BAND: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, BAND_QUERIES: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad_k`` and ``grad_v`` of block ``program_id(0)`` of the keys of head ``program_id(1)``.

    Through lists and band come the gradients of queries from ``first_row`` up to ``end_row``, of which ``queries``
    counts from the first. Where these are not all, ``sum_k`` and ``sum_v``, float32 ``[B, Hkv, M, W or WV]``, carry
    the sums to the next call, and the ``LAST`` one adds the rest.

    ``GROUP`` query heads attend a key/value head; ``SHARE`` of them have one list. ``column_grad_k`` and
    ``column_grad_v``: float32 ``[B, Hkv, C, W or WV]``, added to the keys that are columns; ``span_grad_k`` and
    ``span_grad_v``: float32 ``[B, Hkv, M, W or WV]``, added to all; ``place_grad_k`` and ``place_grad_v``: float32
    ``[B, list heads, L, W or WV]``, added to the key at each place, which `triton_slices.places_of_keys` finds.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    # [S]
    keys = block * BLOCK + tl.arange(0, BLOCK)
    in_range = keys < num_keys
    some = tl.where(in_range, keys, -1)
    # [S, W], [S, WV]
    key_tile = gather(k.pointer + batch * k.batch + kv_head * k.head, some, k, K_ROW, D, W)
    value_tile = gather(v.pointer + batch * v.batch + kv_head * v.head, some, v, V_ROW, DV, WV)
    acc_k = tl.zeros((BLOCK, W), tl.float32)
    acc_v = tl.zeros((BLOCK, WV), tl.float32)
    head = kv_head * GROUP
    q_start = q.pointer + batch * q.batch + head * q.head
    grad_start = grad_out.pointer + batch * grad_out.batch + head * grad_out.head
    of_head = statistics + (batch * tl.num_programs(1) * num_queries + kv_head * num_queries) * (2 * GROUP)

    touched = tl.zeros((), tl.int32)
    if BAND:
        first = tl.maximum(block * BLOCK - fixed.after - fixed.offset, first_row)
        end = tl.minimum(tl.minimum(block * BLOCK + BLOCK, num_keys) - 1 + fixed.before - fixed.offset + 1, end_row)
        touched += tl.maximum(end - first, 0)
        # [R]
        heads = tl.arange(0, BAND_QUERIES * GROUP_PADDED) % GROUP_PADDED
        for start in range(first, end, BAND_QUERIES):
            row = start + tl.arange(0, BAND_QUERIES * GROUP_PADDED) // GROUP_PADDED
            distance = keys[:, None] - (row + fixed.offset)[None, :]
            allowed = (distance >= -fixed.before) & (distance <= fixed.after) & in_range[:, None]
            allowed = kept_pairs(fixed, batch, keys, row, allowed & (row < num_queries)[None, :])
            acc_k, acc_v = key_step(
                row, tl.where((heads < GROUP) & (row < end), heads, -1), allowed, None, key_tile, value_tile, acc_k,
                acc_v, q, q_start, grad_out, grad_start, of_head, scale * LOG2_E,
                GROUP, Q_ROW, GRAD_ROW, OFFSET, D, DV, W, WV, PRECISION,
            )  # fmt: skip
    if starts is not None:
        share = tl.arange(0, QUERIES * SHARE_PADDED) % SHARE_PADDED
        for sharing in tl.static_range(GROUP // SHARE):
            list_head = (kv_head * (GROUP // SHARE) + sharing) % list_heads
            index = ((batch % list_batches) * list_heads + list_head) * (blocks + 1) + block
            first_entry = tl.load(starts + index)
            count = (tl.load(starts + index + 1) - first_entry).to(tl.int32)
            touched += count
            for start in range(0, count, QUERIES):
                entry = start + tl.arange(0, QUERIES * SHARE_PADDED) // SHARE_PADDED
                row = first_row + tl.load(queries + first_entry + entry, mask=entry < count, other=0)
                bits = tl.load(masks + first_entry + entry, mask=entry < count, other=0)
                allowed = ((bits[None, :] >> tl.arange(0, BLOCK)[:, None]) & 1) != 0
                mine = tl.where((share < SHARE) & (entry < count), share + sharing * SHARE, -1)
                acc_k, acc_v = key_step(
                    row, mine, allowed, None, key_tile, value_tile, acc_k, acc_v,
                    q, q_start, grad_out, grad_start, of_head, scale * LOG2_E,
                GROUP, Q_ROW, GRAD_ROW, OFFSET, D, DV, W, WV, PRECISION,
                )  # fmt: skip
    acc_k *= scale
    dims = tl.arange(0, W)[None, :]
    value_dims = tl.arange(0, WV)[None, :]
    at = ((batch * tl.num_programs(1) + kv_head) * num_keys + keys)[:, None]
    if sum_k is not None:  # noqa: SIM102, a constant
        if LAST or touched > 0:
            acc_k += tl.load(sum_k + at * W + dims, mask=in_range[:, None], other=0.0)
            acc_v += tl.load(sum_v + at * WV + value_dims, mask=in_range[:, None], other=0.0)
    if not LAST:
        if touched > 0:
            tl.store(sum_k + at * W + dims, acc_k, mask=in_range[:, None])
            tl.store(sum_v + at * WV + value_dims, acc_v, mask=in_range[:, None])
        return
    if column_grad_k is not None:
        for index in range(fixed.num_columns):
            here = (keys == tl.load(fixed.columns + index))[:, None]
            place = (batch * tl.num_programs(1) + kv_head) * fixed.num_columns + index
            acc_k += tl.load(column_grad_k + place * W + dims, mask=here, other=0.0)
            acc_v += tl.load(column_grad_v + place * WV + value_dims, mask=here, other=0.0)
    if span_grad_k is not None:
        acc_k += tl.load(span_grad_k + at * W + dims, mask=in_range[:, None], other=0.0)
        acc_v += tl.load(span_grad_v + at * WV + value_dims, mask=in_range[:, None], other=0.0)
    if places is not None:
        for sharing in tl.static_range(GROUP // SHARE):
            list_head = kv_head * (GROUP // SHARE) + sharing
            index = (batch % order_batches) * order_heads + list_head % order_heads
            of_key = place_starts + index * num_keys + keys
            first_place = tl.load(of_key, mask=in_range, other=0)
            count = tl.load(of_key + 1, mask=in_range, other=0) - first_place
            of_list = (batch * tl.num_programs(1) * (GROUP // SHARE) + list_head) * num_places
            for nth in range(tl.max(count, 0)):
                here = nth < count
                place = of_list + tl.load(places + first_place + nth, mask=here, other=0) - index * num_places
                acc_k += tl.load(place_grad_k + place[:, None] * W + dims, mask=here[:, None], other=0.0)
                acc_v += tl.load(place_grad_v + place[:, None] * WV + value_dims, mask=here[:, None], other=0.0)
    key_at = keys[:, None].to(tl.int64)
    k_at = grad_k.pointer + batch * grad_k.batch + kv_head * grad_k.head + key_at * grad_k.row + dims
    v_at = grad_v.pointer + batch * grad_v.batch + kv_head * grad_v.head + key_at * grad_v.row + value_dims
    tl.store(k_at, acc_k.to(grad_k.pointer.dtype.element_ty), mask=in_range[:, None] & (dims < D))
    tl.store(v_at, acc_v.to(grad_v.pointer.dtype.element_ty), mask=in_range[:, None] & (value_dims < DV))


@triton.jit
def column_gradient_kernel(
    grad_out, q, k, v, statistics, partial_k, partial_v, fixed, kv_heads, num_queries, num_keys, rows_each, scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, Q_ROW: tl.constexpr, GRAD_ROW: tl.constexpr,
    OFFSET: tl.constexpr, CAUSAL: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``rows_each`` queries from ``program_id(0)`` on give to the ``BLOCK`` columns from ``program_id(1)`` on.

    ``partial_k``, ``partial_v``: float32 ``[splits, B·Hkv, C, W or WV]``; they are added up afterwards, since every
    query attends to the columns, far too many for the program of a block of keys.
    """
    split = tl.program_id(0)
    head_index = tl.program_id(2)
    batch = (head_index // kv_heads).to(tl.int64)
    kv_head = (head_index % kv_heads).to(tl.int64)
    # [S]
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = index < fixed.num_columns
    keys = tl.load(fixed.columns + index, mask=real, other=-1)
    # [S, W], [S, WV]
    key_tile = gather(k.pointer + batch * k.batch + kv_head * k.head, keys, k, K_ROW, D, W)
    value_tile = gather(v.pointer + batch * v.batch + kv_head * v.head, keys, v, V_ROW, DV, WV)
    acc_k = tl.zeros((BLOCK, W), tl.float32)
    acc_v = tl.zeros((BLOCK, WV), tl.float32)
    head = kv_head * GROUP
    q_start = q.pointer + batch * q.batch + head * q.head
    grad_start = grad_out.pointer + batch * grad_out.batch + head * grad_out.head
    of_head = statistics + (batch * kv_heads * num_queries + kv_head * num_queries) * (2 * GROUP)
    end = tl.minimum((split + 1) * rows_each, num_queries)
    heads = tl.arange(0, QUERIES * GROUP_PADDED) % GROUP_PADDED
    for start in range(split * rows_each, end, QUERIES):
        # [R]
        row = start + tl.arange(0, QUERIES * GROUP_PADDED) // GROUP_PADDED
        first, last = band_of(fixed, row + fixed.offset, num_keys)
        allowed = (keys[:, None] < first[None, :]) | (keys[:, None] > last[None, :])
        if CAUSAL:
            allowed = allowed & (keys[:, None] <= (row + fixed.offset)[None, :])
        allowed = kept_pairs(fixed, batch, keys, row, allowed & real[:, None] & (row < end)[None, :])
        acc_k, acc_v = key_step(
            row, tl.where((heads < GROUP) & (row < end), heads, -1), allowed, None, key_tile, value_tile, acc_k, acc_v,
            q, q_start, grad_out, grad_start, of_head, scale * LOG2_E,
                GROUP, Q_ROW, GRAD_ROW, OFFSET, D, DV, W, WV, PRECISION,
        )  # fmt: skip
    place = ((split * tl.num_programs(2) + head_index).to(tl.int64) * fixed.num_columns + index)[:, None]
    tl.store(partial_k + place * W + tl.arange(0, W)[None, :], acc_k * scale, mask=real[:, None])
    tl.store(partial_v + place * WV + tl.arange(0, WV)[None, :], acc_v, mask=real[:, None])
