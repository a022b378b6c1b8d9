"""Grouping by a stable sort; any device."""

from __future__ import annotations

import torch
from torch import Tensor


def group(key_buckets: Tensor, query_buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ssa_framework.ops.group_keys.api.group_keys`."""
    batch, heads, orders, _ = key_buckets.shape
    _, graph_heads, queries, _, slices = query_buckets.shape
    buckets = torch.where(key_buckets < 0, num_buckets, key_buckets)
    sorted_buckets, order = buckets.sort(dim=-1, stable=True)
    wanted = query_buckets.clamp(min=0).movedim(3, 2).flatten(3)  # [B, G, S, N·P]
    wanted = wanted.unflatten(1, (heads, -1)).movedim(2, 3).flatten(3).contiguous()  # [B, Hkv, S, g·N·P]
    start = torch.searchsorted(sorted_buckets, wanted)
    end = torch.searchsorted(sorted_buckets, wanted, right=True)

    def per_query(x: Tensor) -> Tensor:
        x = x.unflatten(3, (graph_heads // heads, queries, slices))  # [B, Hkv, S, g, N, P]
        return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, graph_heads, queries, orders, slices)

    start, end = per_query(start), per_query(end)
    end = torch.where(query_buckets < 0, start, end)
    longest = int((key_buckets >= 0).sum(-1).max()) if key_buckets.numel() else 0
    return order[..., :longest].to(torch.int32), start.to(torch.int32), end.to(torch.int32)
