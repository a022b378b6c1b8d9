"""`cluster_members`: which cluster each key is in."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


@torch.no_grad()
def cluster_members(order: Tensor, start: Tensor, size: Tensor, keys: int, first: int = 0) -> Tensor:
    """The number of the cluster of each key, counted from ``first`` on.

    Args:
        order: int32 ``[B, Hkv, L]``, the keys cluster by cluster, each key at most once in a cluster.
        start, size: int32 ``[B, Hkv, C]``; the keys of a cluster are ``order[start : start + size]``, and no two
            clusters share a key.
        keys: M.

    Returns:
        int32 ``[B, Hkv, M]``, -1 = in none.
    """
    batch, heads, count = size.shape
    if order.is_cuda and find_spec("triton") is not None:
        from ssa_framework.ops.cluster_keys import triton_cuda  # Triton takes a moment to import

        return triton_cuda.members(order, start, size, keys, first)
    length = order.shape[2]
    number = torch.where(size > 0, torch.arange(1, count + 1, device=size.device), 0)
    # +number where a cluster begins and -number where it ends: the sum up to a place is the number there
    steps = torch.zeros((batch, heads, length + 1), dtype=torch.int64, device=size.device)
    begin = start.long()
    steps.scatter_add_(2, begin, number).scatter_add_(2, begin + size, -number)
    owner = steps.cumsum(2)[..., :length]
    members = torch.full((batch, heads, keys + 1), -1, dtype=torch.int32, device=size.device)
    places = torch.where(owner > 0, order, keys).long()
    return members.scatter_(2, places, (owner - 1 + first).int())[..., :keys]
