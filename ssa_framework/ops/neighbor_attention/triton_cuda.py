"""CUDA: fused forward and recomputing backward; no host synchronisation, nothing of size N·K·D in memory.

For the gradients of keys and values, the lists are turned around first (`triton_invert`), so that each block of keys
adds up its own rows, in the order of the queries: no atomics, and the same inputs always give the same bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops.neighbor_attention import triton_few_call
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.neighbor_attention.triton_backward import (
    column_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from ssa_framework.ops.neighbor_attention.triton_call import (
    NO_ROWS,
    Call,
    attend_interval_programs,
    attend_programs,
    broadcast_stride,
    interval_key_programs,
    interval_programs,
    key_programs,
    next_power,
    prepare,
    prepare_rows,
    query_programs,
    rows,
)
from ssa_framework.ops.neighbor_attention.triton_forward import attend_kernel
from ssa_framework.ops.neighbor_attention.triton_intervals import (
    REACH_ROWS,
    Intervals,
    attend_intervals_kernel,
    interval_key_gradient_kernel,
    interval_query_gradient_kernel,
    reach_kernel,
)
from ssa_framework.ops.neighbor_attention.triton_invert import BLOCK_KEYS, invert_lists, num_blocks
from ssa_framework.ops.neighbor_attention.triton_slices import (
    BLOCK_PLACES,
    MOST_PARTS,
    add_parts_kernel,
    place_gradient_kernel,
    places_of_keys,
    share_out,
    sort_pairs,
)
from ssa_framework.ops.triton_runtime import launches

_PROGRAMS = 1024  # enough to fill a large GPU
_MOST_SPLITS, _QUERIES_OF_A_SPLIT = 8, 16384
"""Of the queries that attend a block of summaries: one program alone would be the last to finish by far."""
_CACHED_BYTES = 2**26
"""Of queries and their gradients, for the gradients of keys and values; about what the L2 cache holds (measured)."""

_Pair = tuple[Tensor | None, Tensor | None]


@launches
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
    if triton_few_call.are_few(q):
        return triton_few_call.forward(q, k, v, parts, scale=scale, fp32_weights=fp32_weights)
    call = prepare_rows(q, k, v, parts)
    batch, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((batch, heads, queries, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    fp32 = fp32_weights and v.dtype != torch.float32
    partial = partial_lse = NO_ROWS
    if call.has_intervals:
        goes_on = call.has_band or call.has_lists
        # float32 where the softmax goes on, so that what is merged has not been rounded
        first = torch.empty_like(out, dtype=torch.float32) if goes_on else out
        first_lse = torch.empty_like(lse) if goes_on else lse
        options = attend_interval_programs(call, q, parts.causal)
        attend_intervals_kernel[(triton.cdiv(queries, options["QUERIES"]), kv_heads, batch)](
            rows(q), rows(k), rows(v), rows(call.summary_k), rows(call.summary_v), rows(first),
            rows(first_lse.unsqueeze(-1)), call.fixed, call.spans, call.seen, queries, scale,
            COLUMNS=call.has_shared_columns, FP32=fp32, **options,
        )  # fmt: skip
        if not goes_on:
            return out, lse
        partial, partial_lse = rows(first), rows(first_lse.unsqueeze(-1))
    attend_kernel[(queries, heads // call.share, batch)](
        rows(q), rows(k), rows(v), rows(out), rows(lse.unsqueeze(-1)), partial, partial_lse,
        call.fixed, call.lists, call.slices, queries, k.shape[2], scale,
        FP32=fp32, **attend_programs(call, parts.causal),
    )  # fmt: skip
    return out, lse


@launches
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
    call = prepare(q, k, v, parts)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad_bias, of_summary_k, of_summary_v = (
        torch.zeros(() if x is None else x.shape, dtype=torch.float32, device=q.device)
        for x in (None, parts.summary_k, parts.summary_v)
    )
    if not q.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_bias, of_summary_k, of_summary_v
    statistics = torch.empty((*q.shape[:3], 2), dtype=torch.float32, device=q.device)
    by_rows = prepare_rows(q, k, v, parts)
    _query_gradients(by_rows, grad_out, grad_lse, q, k, v, out, lse, statistics, grad_q, parts.causal, scale)
    if k.shape[2]:
        _key_gradients(call, grad_out, q, k, v, statistics, grad_k, grad_v, parts.causal, scale)
    if call.seen.first is not None:
        tables = call.summary_k, call.summary_v
        grads = _interval_gradients(call, call.seen, tables, grad_out, q, statistics, False, scale)
        of_summary_k, of_summary_v = (
            x[..., : like.shape[-1]].reshape(like.shape).contiguous() for x, like in zip(grads, tables, strict=True)
        )
    return grad_q, grad_k, grad_v, grad_bias, of_summary_k, of_summary_v


def _query_gradients(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    grad_q: Tensor,
    causal: bool,
    scale: float,
) -> None:
    """``grad_q`` and ``statistics``."""
    batch, heads, queries, _ = q.shape
    given = rows(grad_out), rows(grad_lse.unsqueeze(-1)), rows(q), rows(k), rows(v)
    result = rows(out), rows(lse.unsqueeze(-1))
    partial = NO_ROWS
    if call.has_intervals:
        target = torch.empty_like(grad_q, dtype=torch.float32) if call.has_rows else grad_q
        options = interval_programs(call, q, causal)
        interval_query_gradient_kernel[(triton.cdiv(queries, options["QUERIES"]), k.shape[1], batch)](
            *given, rows(call.summary_k), rows(call.summary_v), *result, rows(target), statistics,
            call.fixed, call.spans, call.seen, queries, scale, 1.0 if call.has_rows else scale, **options,
        )  # fmt: skip
        if not call.has_rows:
            return
        partial = rows(target)
    query_gradient_kernel[(queries, heads // call.share, batch)](
        *given, *result, rows(grad_q), statistics, partial, call.fixed, call.lists, call.slices,
        queries, k.shape[2], scale, **query_programs(call, causal),
    )  # fmt: skip


def _key_gradients(
    call: Call,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    causal: bool,
    scale: float,
) -> None:
    batch, kv_heads, keys, _ = k.shape
    queries = q.shape[2]
    span_grads: _Pair = (None, None)
    if call.spans.first is not None:
        span_grads = _interval_gradients(call, call.spans, (k, v), grad_out, q, statistics, causal, scale)
    share = next_power(call.share)
    options = key_programs(call, q, grad_out, share)
    column_grads = _column_gradients(call, grad_out, q, k, v, statistics, causal, scale)
    place_grads = _place_gradients(call, grad_out, q, k, v, statistics, causal, scale)
    # queries are taken so many at a time that what is read of them, again and again, stays in the cache
    row_bytes = call.group * (q.shape[3] * q.element_size() + grad_out.shape[3] * grad_out.element_size())
    at_once = queries if call.neighbors is None else max(1, _CACHED_BYTES // row_bytes)
    sums: _Pair = (None, None)
    if queries > at_once:
        shapes = ((batch, kv_heads, keys, call.widths[w]) for w in ("W", "WV"))
        sum_k, sum_v = (torch.zeros(s, dtype=torch.float32, device=q.device) for s in shapes)
        sums = sum_k, sum_v
    for first in range(0, queries, at_once):
        end = min(first + at_once, queries)
        entries: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        list_batches = list_heads = 1
        if call.neighbors is not None:
            list_batches, list_heads = call.neighbors.shape[:2]
            some = call.neighbors[:, :, first:end]
            entries = invert_lists(some, call.lists._replace(pointer=some), keys)
        key_gradient_kernel[(num_blocks(keys), kv_heads, batch)](
            rows(grad_out), rows(q), rows(k), rows(v), statistics, rows(grad_k), rows(grad_v),
            call.fixed, *entries, list_batches, list_heads, num_blocks(keys), *sums, first, end,
            *column_grads, *span_grads, *place_grads, queries, keys, scale,
            SHARE=call.share, SHARE_PADDED=share, BAND=call.has_band,
            BAND_QUERIES=max(1, options["QUERIES"] * share // options["GROUP_PADDED"]), LAST=end == queries, **options,
        )  # fmt: skip


def _interval_gradients(
    call: Call,
    intervals: Intervals,
    tables: tuple[Tensor, Tensor],
    grad_out: Tensor,
    q: Tensor,
    statistics: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """float32 ``[B·Hkv, C, width]`` for the rows of both ``tables``."""
    k, v = tables
    batch, kv_heads, length, _ = k.shape
    queries, first = q.shape[2], intervals.first
    blocks = triton.cdiv(queries, REACH_ROWS)
    reach = torch.empty((first.shape[0], intervals.levels, blocks, 2), dtype=torch.int32, device=q.device)
    reach_kernel[(blocks, intervals.levels, first.shape[0])](
        intervals, reach, queries, call.fixed.offset, CAUSAL=causal, ROWS=REACH_ROWS
    )
    options = interval_key_programs(call, q, grad_out) | {"K_ROW": k.stride(2), "V_ROW": v.stride(2)}
    tiles = triton.cdiv(length, options["BLOCK"])
    splits = max(1, min(triton.cdiv(queries, options["QUERIES"]), _PROGRAMS // (batch * kv_heads * tiles)))
    if intervals.weights is not None:  # all later queries attend the summaries of the last level, few those of others
        splits = max(splits, min(_MOST_SPLITS, triton.cdiv(queries, _QUERIES_OF_A_SPLIT)))
    partials = [
        torch.empty((splits, batch * kv_heads, length, call.widths[w]), dtype=torch.float32, device=q.device)
        for w in ("W", "WV")
    ]
    interval_key_gradient_kernel[(splits, tiles, batch * kv_heads)](
        rows(grad_out), rows(q), rows(k), rows(v), statistics, *partials, call.fixed, intervals, reach,
        broadcast_stride(reach, 0), blocks, kv_heads, queries, scale,
        CAUSAL=causal, OPENED=next_power(max(1, intervals.opened_slots)),
        SHARED=intervals.opened_member == 0, ROWS=REACH_ROWS, **options,
    )  # fmt: skip
    grad_k, grad_v = (x[0] if splits == 1 else x.sum(0) for x in partials)
    return grad_k, grad_v


def _place_gradients(
    call: Call, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, causal: bool, scale: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """float32 ``[B, list heads, L, width]`` for keys and values at the places of the order, the places of each key,
    where they begin, and the sizes of the order."""
    start, order, length = call.slices.start, call.slices.order, call.slices.length
    if start is None:
        return None, None, None, None, 1, 1, 0
    batch, keys = k.shape[0], k.shape[2]
    list_heads = q.shape[1] // call.share
    pairs, windows = sort_pairs(start, call.slices.end, length)
    partials = [
        torch.empty((batch, list_heads, length, call.widths[w]), dtype=torch.float32, device=q.device)
        for w in ("W", "WV")
    ]
    share = next_power(call.share)
    options = key_programs(call, q, grad_out, share) | {"BLOCK": BLOCK_PLACES}
    options["num_warps"] = min(8, 2 * options["num_warps"])  # twice the keys of a block in registers
    del options["GROUP_PADDED"]
    blocks = triton.cdiv(length, BLOCK_PLACES)
    copies = batch * list_heads // (start.shape[0] * start.shape[1])
    parts = share_out(windows, copies, (call.widths["W"], call.widths["WV"]))
    place_gradient_kernel[(blocks * MOST_PARTS, list_heads, batch)](
        rows(grad_out), rows(q), rows(k), rows(v), statistics, *partials, call.fixed, call.slices, pairs, windows,
        parts, *start.shape[:2], blocks, q.shape[2], keys, scale,
        CAUSAL=causal, SHARE=call.share, SHARE_PADDED=share, **options,
    )  # fmt: skip
    add_parts_kernel[(blocks, list_heads, batch)](
        *partials, parts, *start.shape[:2], length, W=call.widths["W"], WV=call.widths["WV"], BLOCK=BLOCK_PLACES
    )
    places, first_places = places_of_keys(order, windows, (start.shape[0], start.shape[1]), keys)
    return partials[0], partials[1], places, first_places, order.shape[0], order.shape[1], length


def _column_gradients(
    call: Call,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """float32 ``[B·Hkv, C, width]`` for keys and values."""
    columns = call.fixed.num_columns
    if not columns:
        return None, None
    batch, kv_heads, queries = k.shape[0], k.shape[1], q.shape[2]
    tiles = triton.cdiv(columns, BLOCK_KEYS)
    options = key_programs(call, q, grad_out, next_power(call.group))
    rows_at_once = options["QUERIES"]
    splits = max(1, min(triton.cdiv(queries, rows_at_once), _PROGRAMS // (batch * kv_heads * tiles)))
    rows_each = triton.cdiv(triton.cdiv(queries, splits), rows_at_once) * rows_at_once
    splits = triton.cdiv(queries, rows_each)
    partial_k, partial_v = (
        torch.empty((splits, batch * kv_heads, columns, call.widths[w]), dtype=torch.float32, device=q.device)
        for w in ("W", "WV")
    )
    column_gradient_kernel[(splits, tiles, batch * kv_heads)](
        rows(grad_out), rows(q), rows(k), rows(v), statistics, partial_k, partial_v,
        call.fixed, kv_heads, queries, k.shape[2], rows_each, scale,
        CAUSAL=causal, **options,
    )  # fmt: skip
    return partial_k.sum(0), partial_v.sum(0)
