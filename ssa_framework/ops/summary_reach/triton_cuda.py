"""CUDA: the last key of each group, then blocks of queries against the groups that any of them attends."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops.summary_reach.triton_reach import last_kernel, later_kernel
from ssa_framework.ops.triton_runtime import launches

_KEYS, _QUERIES, _GROUPS = 1024, 64, 64


@launches
def reaches_later(members: Tensor, count: int, first: Tensor, stop: Tensor, positions: Tensor) -> Tensor:
    """See `ssa_framework.ops.summary_reach.api.reaches_later`."""
    batches, heads, levels, keys = members.shape
    batch, queries = max(x.shape[0] for x in (members, first, positions)), first.shape[1]
    found = torch.zeros((), dtype=torch.int32, device=members.device)
    if not (count and levels and keys and heads and queries):
        return found != 0
    members, positions = members.contiguous(), positions.contiguous()
    first, stop = first.contiguous(), stop.contiguous()
    last = torch.full((batches, count), -1, dtype=torch.int32, device=members.device)
    last_kernel[(triton.cdiv(keys, _KEYS), heads * levels, batches)](members, last, keys, count, KEYS=_KEYS)
    later_kernel[(triton.cdiv(queries, _QUERIES), levels, batch)](
        last, first, stop, positions, found, queries, count,
        *(0 if x.shape[0] == 1 else 1 for x in (last, first, positions)), QUERIES=_QUERIES, GROUPS=_GROUPS,
    )  # fmt: skip
    return found != 0
