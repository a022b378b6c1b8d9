"""Which packed document each query and key belongs to, and the place of each key in its document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.plugin import RoutingContext


@dataclass(frozen=True)
class Documents:
    """Attributes:
    count: how many documents there are.
    of_queries, of_keys: document numbers from 0, int64 ``[B or 1, N]`` and ``[B or 1, M]``.
    key_rank: position of each key minus that of the first real key of its document, int64 ``[B or 1, M]``.
    """

    count: int
    of_queries: Tensor
    of_keys: Tensor
    key_rank: Tensor

    @classmethod
    def of(cls, ctx: RoutingContext) -> Documents:
        if ctx.segments is None:
            of_queries = torch.zeros((1, ctx.num_queries), dtype=torch.int64, device=ctx.device)
            of_keys = torch.zeros((1, ctx.num_keys), dtype=torch.int64, device=ctx.device)
        else:
            query_ids, key_ids = ctx.segments
            rows = max(query_ids.shape[0], key_ids.shape[0])
            ids = torch.cat([query_ids.expand(rows, -1), key_ids.expand(rows, -1)], dim=1)
            numbers = torch.unique(ids, return_inverse=True)[1]
            of_queries, of_keys = numbers[:, : ctx.num_queries], numbers[:, ctx.num_queries :]
        places = torch.arange(ctx.num_keys, device=ctx.device)[None]
        real = places if ctx.key_keep is None else torch.where(ctx.key_keep, places, ctx.num_keys)
        rows = max(of_keys.shape[0], real.shape[0])
        of_keys = of_keys.expand(rows, -1)
        count = max(int(of_keys.max()), int(of_queries.max())) + 1
        first = torch.full((rows, count), ctx.num_keys, dtype=torch.int64, device=ctx.device)
        first.scatter_reduce_(1, of_keys, real.expand(rows, -1), "amin")
        return cls(count, of_queries, of_keys, places - first.gather(1, of_keys))
