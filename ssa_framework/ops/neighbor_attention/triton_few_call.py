"""Few queries: how many programs share what one of them attends to, and the two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.neighbor_attention.triton_call import Call, broadcast_stride, next_power, prepare, rows
from ssa_framework.ops.neighbor_attention.triton_few import (
    Partials,
    Positions,
    attend_few_kernel,
    merge_few_kernel,
)

_FEW = 4
"""Most queries that are shared out among programs; more fill a GPU as they are, and share tiles of keys."""

_PROGRAMS = 512
"""Of all queries and list heads together: as many as a large GPU holds at a time, since they wait for memory most of
their time."""

_MOST_SHARES = 64
"""Of a query: their results have to be merged."""

_SLOTS = 32
"""Keys or summaries of one step."""


def are_few(q: Tensor) -> bool:
    """Whether the queries ``q [B, H, N, D]`` are few enough."""
    return 0 < q.shape[2] <= _FEW


def forward(
    q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, *, scale: float, fp32_weights: bool
) -> tuple[Tensor, Tensor]:
    """See `ssa_framework.ops.neighbor_attention.triton_cuda.forward`."""
    call = prepare(q, k, v, parts, rounded=False)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = torch.empty((batch, heads, queries, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    share = 1 if call.seen.opened_member else call.share
    list_heads = heads // share
    shares = _shares(batch * queries * list_heads)
    width = call.widths["WV"]
    partials = Partials(
        torch.empty((batch, heads, queries, shares, width), dtype=torch.float32, device=q.device),
        torch.empty((batch, heads, queries, shares), dtype=torch.float32, device=q.device),
    )
    positions = parts.positions
    if positions is None:
        first = parts.query_offset
        positions = torch.arange(first, first + queries, dtype=torch.int32, device=q.device)[None]
    attend_few_kernel[(shares * queries, list_heads, batch)](
        rows(q), rows(k), rows(v), rows(call.summary_k), rows(call.summary_v), partials,
        Positions(positions, broadcast_stride(positions, 0), positions.stride(1)),
        call.fixed._replace(offset=0), call.lists, call.slices, call.seen, keys, scale,
        SHARES=shares, HEADS=share, KV_SHARE=heads // kv_heads // share, CAUSAL=parts.causal,
        FIXED=call.has_fixed, **call.widths, SUMMARY_K_ROW=call.summary_k.stride(2),
        SUMMARY_V_ROW=call.summary_v.stride(2), SLICES=next_power(max(1, call.slices.slots)),
        OPENED=next_power(max(1, call.seen.opened_slots)), FP32=fp32_weights and v.dtype != torch.float32,
        PRECISION=call.precision, **_programs(call, share),
    )  # fmt: skip
    merge_few_kernel[(queries, heads, batch)](
        partials, rows(out), rows(lse.unsqueeze(-1)), DV=v.shape[-1], WV=width, SHARES=shares, num_warps=4,
    )  # fmt: skip
    return out, lse


def _shares(lines: int) -> int:
    """Programs of each of ``lines`` queries of a list head, a power of 2."""
    return min(_MOST_SHARES, next_power(max(1, _PROGRAMS // lines) + 1) // 2)


def _programs(call: Call, share: int) -> dict[str, int]:
    """A matrix unit multiplies 8 rows at least; one row alone is done without it (not measured)."""
    padded = 1 if share == 1 else max(8, next_power(share))
    width = max(call.widths["W"], call.widths["WV"])
    return {
        "PADDED": padded,
        "SLOTS": _SLOTS if width <= 128 and not call.exact else _SLOTS // 2,
        "num_warps": min(8, max(2, padded * width // 1024)),
        "num_stages": 1,
    }
