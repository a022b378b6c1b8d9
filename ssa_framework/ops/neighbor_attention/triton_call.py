"""One call's tensors and sizes as the kernels take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.neighbor_attention.triton_intervals import Intervals
from ssa_framework.ops.neighbor_attention.triton_invert import BLOCK_KEYS
from ssa_framework.ops.neighbor_attention.triton_tiles import Fixed, Lists, Rows, Slices

_LARGE_SHARED_MEMORY = 160 * 1024  # bytes that a program may use, as on A100 and H100

_WIDE_BAND = 64
"""Keys of a band from which on tiles of queries that share them are faster than a gather for each query, although the
result then goes through memory in between (measured)."""

_NO_INTERVALS = Intervals(None, None, 0, 0, 0, 0, 0, None, 0, 0, 0, None, 0, 0, 0, 0, 0, 0)


class Call(NamedTuple):
    """One call's arguments as the kernels take them."""

    fixed: Fixed
    lists: Lists
    slices: Slices
    spans: Intervals
    seen: Intervals
    neighbors: Tensor | None
    summary_k: Tensor  # of the dtype of the keys; the keys again where nothing is seen
    summary_v: Tensor
    group: int  # query heads of a KV head
    share: int  # query heads that share a list
    has_band: bool
    widths: dict[str, Any]
    precision: str  # of products of float32
    exact: bool  # float32, not rounded to tf32

    @property
    def has_intervals(self) -> bool:
        return self.spans.first is not None or self.seen.first is not None

    @property
    def has_fixed(self) -> bool:
        return self.has_band or self.fixed.num_columns > 0

    @property
    def has_shared_columns(self) -> bool:
        """Whether the forward pass attends to columns in the tiles of intervals; what is in the band is not in them."""
        return self.has_intervals and not self.has_band and self.fixed.num_columns > 0

    @property
    def has_lists(self) -> bool:
        """Whether there are lists or slices, which differ from query to query."""
        return self.neighbors is not None or self.slices.start is not None

    @property
    def has_rows(self) -> bool:
        """Whether there is anything beside intervals."""
        return self.has_fixed or self.has_lists


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


NO_ROWS = Rows(None, 0, 0, 0, 0)


def _once(x: Tensor) -> Tensor:
    """Expanded batch and head axes as axes of size 1."""
    for axis in range(2):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


def broadcast_stride(x: Tensor, axis: int) -> int:
    return x.stride(axis) if x.shape[axis] > 1 else 0


def _masks(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Pointer and strides of ``[B or 1, length]``."""
    if x is None:
        return None, 0, 0
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return x, broadcast_stride(x, 0), x.stride(1)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the same strides."""
    return (a, b) if a.stride() == b.stride() else (a.contiguous(), b.contiguous())


def next_power(n: int) -> int:
    return triton.next_power_of_2(n)


def prepare_rows(q: Tensor, k: Tensor, v: Tensor, parts: GraphParts) -> Call:
    """`prepare` for the kernels that take a query or a block of queries: a wide band is a span, if there is no other.

    Columns, slices and lists have the same keys either way. The gradients of the keys take a band as tiles anyhow.
    """
    after = 0 if parts.causal else parts.band_after
    if parts.has_band and parts.span_start is None and parts.band_before + after + 1 >= _WIDE_BAND:
        position = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)[None] + parts.query_offset
        start, end = position - parts.band_before, position + (after + 1)
        parts = replace(parts, span_start=start, span_end=end, band_before=-1, band_after=-1)
    return prepare(q, k, v, parts)


def prepare(q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, *, rounded: bool = True) -> Call:
    """``rounded``: summaries are needed in the dtype of the keys."""
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    columns = parts.columns if parts.columns is not None and parts.columns.numel() and keys else None
    both = parts.query_segments is not None and parts.key_segments is not None
    spans, span_fields = _spans(parts, keys)
    fixed = Fixed(
        parts.band_before,
        min(parts.band_after, 0) if parts.causal else parts.band_after,
        parts.query_offset,
        columns,
        0 if columns is None else columns.numel(),
        *_masks(parts.key_keep),
        *_masks(parts.query_segments if both else None),
        *_masks(parts.key_segments if both else None),
        *span_fields,
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
            neighbors, broadcast_stride(neighbors, 0), broadcast_stride(neighbors, 1), row, slot, neighbors.shape[3]
        )
    slices = _slices(parts, keys)
    group = heads // kv_heads
    list_heads = max((x.shape[1] for x in (neighbors, slices.start, slices.order) if x is not None), default=1)
    seen, summary_k, summary_v = _summaries(parts, k, v, heads, rounded)
    width, value_width = (max(16, next_power(x.shape[-1])) for x in (q, v))
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
    return Call(
        fixed=fixed,
        lists=lists,
        slices=slices,
        spans=spans,
        seen=seen,
        neighbors=neighbors,
        summary_k=summary_k,
        summary_v=summary_v,
        group=group,
        share=1 if list_heads > kv_heads else group,
        has_band=parts.has_band and keys > 0,
        widths=widths,
        precision=precision,
        exact=q.dtype == torch.float32 and precision != "tf32",
    )


def _spans(parts: GraphParts, keys: int) -> tuple[Intervals, tuple[Tensor | None, Tensor | None, int, int]]:
    """As intervals of one level, and as `Fixed` has them."""
    if parts.span_start is None or parts.span_end is None or not keys:
        return _NO_INTERVALS, (None, None, 0, 0)
    start, end = _alike(parts.span_start, parts.span_end)
    strides = broadcast_stride(start, 0), start.stride(1)
    intervals = _NO_INTERVALS._replace(first=start, stop=end, batch=strides[0], row=strides[1], levels=1, length=keys)
    return intervals, (start, end, *strides)


def _slices(parts: GraphParts, keys: int) -> Slices:
    order, start, end = parts.slice_order, parts.slice_start, parts.slice_end
    if order is None or start is None or end is None or not order.numel() or not start.numel() or not keys:
        return Slices(None, None, 0, 0, 0, 0, 0, None, 0, 0, 0, 0)
    start, end = _alike(_once(start), _once(end))
    order = _once(order)
    return Slices(
        start=start,
        end=end,
        batch=broadcast_stride(start, 0),
        head=broadcast_stride(start, 1),
        row=start.stride(2),
        slot=start.stride(3),
        slots=start.shape[3],
        order=order,
        order_batch=broadcast_stride(order, 0),
        order_head=broadcast_stride(order, 1),
        order_place=order.stride(2),
        length=order.shape[2],
    )


def _summaries(parts: GraphParts, k: Tensor, v: Tensor, heads: int, rounded: bool) -> tuple[Intervals, Tensor, Tensor]:
    """Intervals, pseudo-keys and pseudo-values; these rounded like the keys, so that matrix units multiply them."""
    weights, first, stop, opened = (
        parts.summary_log_weight, parts.summary_first, parts.summary_stop, parts.summary_opened
    )  # fmt: skip
    if parts.summary_k is None or parts.summary_v is None or weights is None or not weights.numel():
        return _NO_INTERVALS, k, v
    if first is None or stop is None or not first.numel():
        return _NO_INTERVALS, k, v
    first, stop = _alike(first, stop)
    kv_heads = k.shape[1]
    intervals = _NO_INTERVALS._replace(
        first=first,
        stop=stop,
        batch=broadcast_stride(first, 0),
        row=first.stride(1),
        level=first.stride(2),
        levels=first.shape[2],
        length=weights.shape[2],
        weights=weights,
        weights_batch=weights.stride(0),
        weights_head=weights.stride(1),
        weights_number=weights.stride(2),
    )
    if opened is not None and opened.numel():
        by_query_head = opened.shape[1] > kv_heads
        head = broadcast_stride(opened, 1)
        intervals = intervals._replace(
            opened=opened,
            opened_batch=broadcast_stride(opened, 0),
            opened_kv_head=head * (heads // kv_heads) if by_query_head else head,
            opened_member=head if by_query_head else 0,
            opened_row=opened.stride(2),
            opened_slot=opened.stride(3),
            opened_slots=opened.shape[3],
        )
    if not rounded:
        return intervals, parts.summary_k, parts.summary_v
    return intervals, parts.summary_k.to(k.dtype), parts.summary_v.to(v.dtype)


def query_programs(call: Call, causal: bool) -> dict[str, Any]:
    """Constants and launch options of the kernels that take one query and list head a program (measured on an H100).

    Few registers and little shared memory, for many programs at once: the wait for gathered rows is what costs.
    """
    # a matrix unit multiplies 8 rows at least; one row alone is done without it
    padded = 1 if call.share == 1 else max(8, next_power(call.share))
    width = max(call.widths["W"], call.widths["WV"])
    return {
        "HEADS": call.share,
        "KV_SHARE": call.group // call.share,
        "CAUSAL": causal,
        "FIXED": call.has_fixed,
        **call.widths,
        "PADDED": padded,
        "SLOTS": 16,
        "SLICES": next_power(max(1, call.slices.slots)),
        "PRECISION": call.precision,
        "num_warps": min(8, max(1, padded * width // 1024)),
        "num_stages": 1 if padded == 1 or call.exact else 2,
    }


def attend_programs(call: Call, causal: bool) -> dict[str, Any]:
    """`query_programs` of the forward kernel, which is faster with few registers where rows are short (measured)."""
    options = query_programs(call, causal)
    width = max(call.widths["W"], call.widths["WV"])
    few = options["PADDED"] > 1 and width <= 128 and not call.exact
    return options | {"FIXED": call.has_fixed and not call.has_shared_columns} | ({"maxnreg": 128} if few else {})


def _shared_memory(device: torch.device) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def _tiles(call: Call, q: Tensor) -> tuple[int, int]:
    """Query rows and keys of a tile of the kernels that take blocks of both, as registers and shared memory allow."""
    row_bytes = max(call.widths["W"], call.widths["WV"]) * q.element_size()
    query_rows, keys = (128, 64) if row_bytes <= 256 and not call.exact else (64, 32)
    if row_bytes > 512:
        query_rows = keys = 16
    if q.is_cuda and _shared_memory(q.device) < _LARGE_SHARED_MEMORY:
        query_rows, keys = max(16, query_rows // 2), max(16, keys // 2)
    return query_rows, keys


def interval_programs(call: Call, q: Tensor, causal: bool) -> dict[str, Any]:
    """The same for the kernels that take a block of queries, all heads of a KV group in one tile (not measured)."""
    group = next_power(call.group)
    width = max(call.widths["W"], call.widths["WV"])
    query_rows, keys = _tiles(call, q)
    return {
        "GROUP": call.group,
        "GROUP_PADDED": group,
        "CAUSAL": causal,
        "OFFSET": _offset_type(call, q),
        "Q_ROW": q.stride(2),
        "SUMMARY_K_ROW": call.summary_k.stride(2),
        "SUMMARY_V_ROW": call.summary_v.stride(2),
        **call.widths,
        "QUERIES": max(1, query_rows // group),
        "KEYS": keys,
        "OPENED": next_power(max(1, call.seen.opened_slots)),
        "SHARED": call.seen.opened_member == 0,
        "PRECISION": call.precision,
        "num_warps": 8 if width > 64 else 4,
        "num_stages": 2,
    }


def attend_interval_programs(call: Call, q: Tensor, causal: bool) -> dict[str, Any]:
    """`interval_programs` of the forward kernel: small tiles of which three fit a multiprocessor, so that one
    multiplies while another takes exponentials (measured)."""
    options = interval_programs(call, q, causal)
    row_bytes = max(call.widths["W"], call.widths["WV"]) * q.element_size()
    if row_bytes > 256 or call.exact or options["GROUP_PADDED"] > 64:
        return options
    return options | {"QUERIES": 64 // options["GROUP_PADDED"], "KEYS": 32, "num_warps": 4, "maxnreg": 168}


def interval_key_programs(call: Call, q: Tensor, grad_out: Tensor) -> dict[str, Any]:
    """The same for the kernel that takes a block of keys or summaries and all queries that reach it (not measured)."""
    options = key_programs(call, q, grad_out, next_power(call.group))
    return options | {"BLOCK": _tiles(call, q)[1], "num_warps": 8}


def _offset_type(call: Call, *tensors: Tensor) -> Any:
    """32 bits address the rows of a group of heads, where these span no more, at half the cost of 64."""
    length = tensors[0].shape[2]
    span = max((call.group - 1) * x.stride(1) + (length - 1) * x.stride(2) for x in tensors)
    small = max(span, 2 * call.group * length) < 2**31 - 2**16
    return tl.int32 if small else tl.int64


def key_programs(call: Call, q: Tensor, grad_out: Tensor, sharing: int) -> dict[str, Any]:
    """The same for the kernels that take a block of keys; ``sharing`` heads of a query are read at once."""
    row_bytes = max(call.widths["W"], call.widths["WV"]) * q.element_size()
    # two stages must fit into shared memory
    tile_rows = 32 if call.exact or row_bytes > 512 else 64
    return {
        "GROUP": call.group,
        "GROUP_PADDED": next_power(call.group),
        "Q_ROW": q.stride(2),
        "GRAD_ROW": grad_out.stride(2),
        "OFFSET": _offset_type(call, q, grad_out),
        **call.widths,
        "BLOCK": BLOCK_KEYS,
        "QUERIES": max(1, tile_rows // sharing),
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
