"""Ranking by a stable sort of all scores, some queries at a time; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_SCORES_AT_ONCE = 1 << 24


def rank(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float
) -> OpenedClusters:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, _ = q.shape
    slots = clusters.size.shape[2]

    def of_heads(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // clusters.size.shape[1], dim=1)

    size, start = (of_heads(x)[:, :, None] for x in (clusters.size, clusters.start))  # [B, G, 1, S]
    centroids = of_heads(clusters.centroids.float())
    variances = of_heads(clusters.variances.float()) if clusters.variances is not None and spread else None
    number = torch.arange(slots, device=q.device)
    shape = (batch, heads, queries, most)
    numbers = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    begin, end = (torch.zeros(shape, dtype=torch.int32, device=q.device) for _ in range(2))
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * slots))
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        low, high = (x[:, None, part, None] for x in limits)  # [B or 1, 1, rows, 1, R]
        some = q[:, :, part].float()
        scores = some @ centroids.mT  # [B, G, rows, S]
        if variances is not None:
            scores += (spread * some.square()) @ variances.mT
        inside = ((number[:, None] >= low) & (number[:, None] < high)).any(-1)
        allowed = inside & (size > 0) & (scores > -torch.inf)
        scores, best = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True)
        scores, best = scores[..., :most], best[..., :most]
        keys = size.expand(-1, -1, best.shape[2], -1).gather(3, best)
        fits = (scores > -torch.inf) & (keys.cumsum(-1) <= budget)
        place = start.expand(-1, -1, best.shape[2], -1).gather(3, best)
        here = (slice(None), slice(None), part, slice(0, best.shape[-1]))
        numbers[here] = torch.where(fits, best, -1).to(torch.int32)
        begin[here], end[here] = torch.where(fits, place, 0), torch.where(fits, place + keys, 0)
    return OpenedClusters(numbers, begin, end)
