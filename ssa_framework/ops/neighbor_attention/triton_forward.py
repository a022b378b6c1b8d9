"""Forward kernel: one program per query and list head; band, columns, list and slices in one online softmax."""

from __future__ import annotations

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
    weighted_sum,
)


@triton.jit
def _attend(
    keys, x, m, total, acc, k, v, k_start, v_start, scale,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    PADDED: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (in powers of 2) over ``keys [S]``."""
    # both on their way before either is used
    key_tile = gather(k_start, keys, k, K_ROW, D, W)
    value_tile = gather(v_start, keys, v, V_ROW, DV, WV)
    # [S, PADDED]
    s = products(key_tile, x, PADDED, PRECISION) * scale
    s = tl.where((keys >= 0)[:, None], s, -float("inf"))
    # [1, PADDED]
    new_m = tl.maximum(m, tl.max(s, 0, keep_dims=True))
    # no key so far: subtract 0, so that the weights are exp(-inf) = 0, not NaN
    finite = tl.where(new_m == -float("inf"), 0.0, new_m)
    p = tl.exp2(s - finite)
    keep = tl.exp2(m - finite)
    total = total * keep + p
    acc = weighted_sum(value_tile, p, acc * keep, PADDED, FP32, PRECISION)
    return new_m, total, acc


@triton.jit
def attend_kernel(
    q, k, v, out, lse, partial, partial_lse, fixed, lists, slices, num_queries, num_keys, scale,
    HEADS: tl.constexpr, KV_SHARE: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
    WV: tl.constexpr, PADDED: tl.constexpr,
    SLOTS: tl.constexpr, SLICES: tl.constexpr, FP32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, N, DV]``, ``lse [B, H, N]`` of query ``program_id(0)``, list head ``program_id(1)``.

    A list head is ``HEADS`` query heads with one list; ``KV_SHARE`` list heads share a key/value head. Queries are the
    fastest axis of the grid, so that one head's keys and values stay in the L2 cache. ``partial`` and ``partial_lse``:
    `Rows`, float32, what the intervals gave, which is where the softmax goes on; pointers are ``None`` without them.
    """
    row = tl.program_id(0)
    list_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = list_head // KV_SHARE
    head = list_head * HEADS
    k_start = k.pointer + batch * k.batch + kv_head * k.head
    v_start = v.pointer + batch * v.batch + kv_head * v.head
    # [W, PADDED], or [1, W]
    x = load_heads(q, batch, head, row.to(tl.int64), HEADS, PADDED, D, W)
    m = tl.full((1, PADDED), -float("inf"), tl.float32)
    # [SLOTS, PADDED]; the sum over the slots is taken once, at the end
    total = tl.zeros((SLOTS, PADDED), tl.float32)
    # [WV, PADDED], or [1, WV]
    acc = tl.zeros((1, WV) if PADDED == 1 else (WV, PADDED), tl.float32)
    scale = scale * LOG2_E
    if partial.pointer is not None:
        heads = tl.arange(0, PADDED)[None, :].to(tl.int64)
        at = partial_lse.pointer + batch * partial_lse.batch + (head + heads) * partial_lse.head + row
        m = tl.load(at, mask=heads < HEADS, other=-float("inf")) * LOG2_E
        first_slot = tl.arange(0, SLOTS)[:, None] == 0
        total = tl.where(first_slot & (m > -float("inf")), 1.0, 0.0)
        acc = load_heads(partial, batch, head, row.to(tl.int64), HEADS, PADDED, DV, WV)

    # lists and slices go on where the last step of band and columns has room
    list_start = lists.pointer
    begin = 0
    if lists.pointer is not None:
        list_start += batch * lists.batch + list_head * lists.head + row.to(tl.int64) * lists.row
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
            m, total, acc = _attend(
                keys, x, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
    if lists.pointer is not None:
        keys = listed_keys(list_start, lists, begin, SLOTS)
        for start in range(begin, lists.slots, SLOTS):
            # read ahead, so that a step does not begin with waiting for its own keys
            next_keys = listed_keys(list_start, lists, start + SLOTS, SLOTS)
            m, total, acc = _attend(
                keys, x, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
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
            m, total, acc = _attend(
                keys, x, m, total, acc, k, v, k_start, v_start, scale,
                K_ROW, V_ROW, D, DV, W, WV, PADDED, FP32, PRECISION,
            )  # fmt: skip
            keys = next_keys

    empty = m == -float("inf")
    total = tl.sum(total, 0, keep_dims=True)
    total = tl.where(empty, 1.0, total)
    acc = acc / total
    row_lse = (m + tl.log2(total)) * LN_2
    heads = tl.arange(0, PADDED).to(tl.int64)
    dims = tl.arange(0, WV)
    start = out.pointer + batch * out.batch + head * out.head + row.to(tl.int64) * out.row
    if PADDED == 1:
        tl.store(start + dims[None, :], acc.to(out.pointer.dtype.element_ty), mask=dims[None, :] < DV)
    else:
        inside = (dims[:, None] < DV) & (heads[None, :] < HEADS)
        tl.store(start + heads[None, :] * out.head + dims[:, None], acc.to(out.pointer.dtype.element_ty), mask=inside)
    lse_start = lse.pointer + batch * lse.batch + head * lse.head + row
    tl.store(lse_start + heads[None, :] * lse.head, row_lse, mask=heads[None, :] < HEADS)
