"""CUDA: fused forward and recomputing backward; no host synchronisation, nothing of size N·K·D in memory.

For the gradients of keys and values, the lists are turned around first (`triton_invert`), so that each block of keys
adds up its own rows, in the order of the queries: no atomics, and the same inputs always give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.neighbor_attention.triton_backward import (
    column_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from ssa_framework.ops.neighbor_attention.triton_forward import attend_kernel
from ssa_framework.ops.neighbor_attention.triton_invert import BLOCK_KEYS, invert_lists, num_blocks
from ssa_framework.ops.neighbor_attention.triton_tiles import Fixed, Lists, Rows

_COLUMN_PROGRAMS = 1024  # enough to fill a large GPU


def _rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


def _once(x: Tensor) -> Tensor:
    """Expanded batch and head axes as axes of size 1."""
    for axis in range(2):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


def _broadcast_stride(x: Tensor, axis: int) -> int:
    return x.stride(axis) if x.shape[axis] > 1 else 0


def _masks(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Pointer and strides of ``[B or 1, length]``."""
    if x is None:
        return None, 0, 0
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return x, _broadcast_stride(x, 0), x.stride(1)


class _Call(NamedTuple):
    """One call's arguments as the kernels take them."""

    fixed: Fixed
    lists: Lists
    neighbors: Tensor | None
    group: int  # query heads of a KV head
    share: int  # query heads that share a list
    has_band: bool
    widths: dict[str, Any]
    precision: str  # of products of float32
    exact: bool  # float32, not rounded to tf32


def _next_power(n: int) -> int:
    return triton.next_power_of_2(n)


def _prepare(q: Tensor, k: Tensor, v: Tensor, parts: GraphParts) -> _Call:
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    columns = parts.columns if parts.columns is not None and parts.columns.numel() and keys else None
    both = parts.query_segments is not None and parts.key_segments is not None
    fixed = Fixed(
        parts.band_before,
        min(parts.band_after, 0) if parts.causal else parts.band_after,
        parts.query_offset,
        columns,
        0 if columns is None else columns.numel(),
        *_masks(parts.key_keep),
        *_masks(parts.query_segments if both else None),
        *_masks(parts.key_segments if both else None),
    )
    neighbors = parts.neighbors
    if neighbors is None or not neighbors.numel() or not keys:
        neighbors, lists = None, Lists(None, 0, 0, 0, 0, 0)
    else:
        neighbors = _once(neighbors)
        if neighbors.stride(3) * neighbors.shape[3] >= 2**31:  # slots are addressed in 32 bits
            neighbors = neighbors.contiguous()
        _, _, row, slot = neighbors.stride()
        lists = Lists(
            neighbors, _broadcast_stride(neighbors, 0), _broadcast_stride(neighbors, 1), row, slot, neighbors.shape[3]
        )
    group = heads // kv_heads
    share = 1 if neighbors is not None and neighbors.shape[1] > kv_heads else group
    width, value_width = (max(16, _next_power(x.shape[-1])) for x in (q, v))
    # three products of tf32 are as accurate as float32 (measured) and two to four times as fast as without matrix units
    exact = "tf32x3" if torch.version.hip is None else "ieee"
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else exact
    widths = {
        "K_ROW": k.stride(2),
        "V_ROW": v.stride(2),
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "W": width,
        "WV": value_width,
    }
    has_band = parts.has_band and keys > 0
    exact_inputs = q.dtype == torch.float32 and precision != "tf32"
    return _Call(fixed, lists, neighbors, group, share, has_band, widths, precision, exact_inputs)


def _query_programs(call: _Call, parts: GraphParts) -> dict[str, Any]:
    """Constants and launch options of the kernels that take one query and list head a program (measured on an H100).

    Few registers and little shared memory, for many programs at once: the wait for gathered rows is what costs.
    """
    # a matrix unit multiplies 8 rows at least; one row alone is done without it
    padded = 1 if call.share == 1 else max(8, _next_power(call.share))
    width = max(call.widths["W"], call.widths["WV"])
    return {
        "HEADS": call.share,
        "KV_SHARE": call.group // call.share,
        "CAUSAL": parts.causal,
        "FIXED": call.has_band or call.fixed.num_columns > 0,
        **call.widths,
        "PADDED": padded,
        "SLOTS": 16,
        "PRECISION": call.precision,
        "num_warps": min(8, max(1, padded * width // 1024)),
        "num_stages": 1 if padded == 1 or call.exact else 2,
    }


def _key_programs(call: _Call, q: Tensor, grad_out: Tensor, sharing: int) -> dict[str, Any]:
    """The same for the kernels that take a block of keys; ``sharing`` heads of a query are read at once."""
    group = _next_power(call.group)
    row_bytes = max(call.widths["W"], call.widths["WV"]) * q.element_size()
    rows = 32 if call.exact or row_bytes > 512 else 64  # two stages must fit into shared memory
    length = q.shape[2]
    # 32 bits address the rows of a group of heads, where these span no more, at half the cost of 64
    span = max((call.group - 1) * x.stride(1) + (length - 1) * x.stride(2) for x in (q, grad_out))
    small = max(span, 2 * call.group * length) < 2**31 - 2**16
    return {
        "GROUP": call.group,
        "GROUP_PADDED": group,
        "Q_ROW": q.stride(2),
        "GRAD_ROW": grad_out.stride(2),
        "OFFSET": tl.int32 if small else tl.int64,
        **call.widths,
        "BLOCK": BLOCK_KEYS,
        "QUERIES": max(1, rows // sharing),
        "PRECISION": call.precision,
        "num_warps": (8 if row_bytes > 512 else 4)
        if call.exact
        else 1
        if row_bytes <= 128
        else 2
        if row_bytes <= 256
        else 4,
        "num_stages": 2,
    }


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
    call = _prepare(q, k, v, parts)
    batch, heads, queries, _ = q.shape
    out = torch.empty((batch, heads, queries, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    attend_kernel[(queries, heads // call.share, batch)](
        _rows(q), _rows(k), _rows(v), _rows(out), _rows(lse.unsqueeze(-1)), call.fixed, call.lists,
        queries, k.shape[2], scale,
        FP32=fp32_weights and v.dtype != torch.float32, **_query_programs(call, parts),
    )  # fmt: skip
    return out, lse


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
    """Gradients ``(q, k, v, bias, summary_k, summary_v)``; the last three are empty, since they are not served."""
    call = _prepare(q, k, v, parts)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    none = torch.empty((), dtype=torch.float32, device=q.device)
    absent = none, none.clone(), none.clone()
    if not q.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), *absent
    batch, heads, queries, _ = q.shape
    statistics = torch.empty((*q.shape[:3], 2), dtype=torch.float32, device=q.device)
    query_gradient_kernel[(queries, heads // call.share, batch)](
        _rows(grad_out), _rows(grad_lse.unsqueeze(-1)), _rows(q), _rows(k), _rows(v), _rows(out),
        _rows(lse.unsqueeze(-1)), _rows(grad_q), statistics, call.fixed, call.lists, queries, k.shape[2], scale,
        **_query_programs(call, parts),
    )  # fmt: skip
    if k.shape[2]:
        _key_gradients(call, grad_out, q, k, v, statistics, grad_k, grad_v, parts, scale)
    return grad_q, grad_k, grad_v, *absent


def _key_gradients(
    call: _Call,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    parts: GraphParts,
    scale: float,
) -> None:
    batch, kv_heads, keys, _ = k.shape
    queries = q.shape[2]
    share = _next_power(call.share)
    options = _key_programs(call, q, grad_out, share)
    column_grads = _column_gradients(call, grad_out, q, k, v, statistics, parts, scale)
    starts = entry_queries = entry_masks = None
    list_batches = list_heads = 1
    if call.neighbors is not None:
        list_batches, list_heads = call.neighbors.shape[:2]
        starts, entry_queries, entry_masks = invert_lists(call.neighbors, call.lists, keys)
    key_gradient_kernel[(num_blocks(keys), kv_heads, batch)](
        _rows(grad_out), _rows(q), _rows(k), _rows(v), statistics, _rows(grad_k), _rows(grad_v),
        call.fixed, starts, entry_queries, entry_masks, list_batches, list_heads, num_blocks(keys),
        *column_grads, queries, keys, scale,
        SHARE=call.share, SHARE_PADDED=share, BAND=call.has_band,
        BAND_QUERIES=max(1, options["QUERIES"] * share // options["GROUP_PADDED"]), **options,
    )  # fmt: skip


def _column_gradients(
    call: _Call,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    parts: GraphParts,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """float32 ``[B·Hkv, C, width]`` for keys and values."""
    columns = call.fixed.num_columns
    if not columns:
        return None, None
    batch, kv_heads, queries = k.shape[0], k.shape[1], q.shape[2]
    tiles = triton.cdiv(columns, BLOCK_KEYS)
    options = _key_programs(call, q, grad_out, _next_power(call.group))
    rows_at_once = options["QUERIES"]
    splits = max(1, min(triton.cdiv(queries, rows_at_once), _COLUMN_PROGRAMS // (batch * kv_heads * tiles)))
    rows_each = triton.cdiv(triton.cdiv(queries, splits), rows_at_once) * rows_at_once
    splits = triton.cdiv(queries, rows_each)
    partial_k, partial_v = (
        torch.empty((splits, batch * kv_heads, columns, call.widths[w]), dtype=torch.float32, device=q.device)
        for w in ("W", "WV")
    )
    column_gradient_kernel[(splits, tiles, batch * kv_heads)](
        _rows(grad_out), _rows(q), _rows(k), _rows(v), statistics, partial_k, partial_v,
        call.fixed, kv_heads, queries, k.shape[2], rows_each, scale,
        CAUSAL=parts.causal, **options,
    )  # fmt: skip
    return partial_k.sum(0), partial_v.sum(0)
