"""Ranking by a stable sort of all scores, some queries at a time; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters

_SCORES_AT_ONCE = 1 << 24


def rank(q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int) -> Tensor:
    """See `ssa_framework.ops.rank_clusters.api.rank_clusters`."""
    batch, heads, queries, _ = q.shape
    slots = clusters.size.shape[2]
    repeats = heads // clusters.size.shape[1]
    size = clusters.size.repeat_interleave(repeats, dim=1)[:, :, None]  # [B, G, 1, S]
    centroids = clusters.centroids.float().repeat_interleave(repeats, dim=1)
    number = torch.arange(slots, device=q.device)
    opened = torch.full((batch, heads, queries, most), -1, dtype=torch.int32, device=q.device)
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * slots))
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        low, high = (x[:, None, part, None] for x in limits)  # [B or 1, 1, rows, 1, R]
        scores = q[:, :, part].float() @ centroids.mT  # [B, G, R, S]
        inside = ((number[:, None] >= low) & (number[:, None] < high)).any(-1)
        allowed = inside & (size > 0) & (scores > -torch.inf)
        scores, best = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True)
        scores, best = scores[..., :most], best[..., :most]
        keys = size.expand(-1, -1, best.shape[2], -1).gather(3, best).cumsum(-1)
        fits = (scores > -torch.inf) & (keys <= budget)
        opened[:, :, part, : best.shape[-1]] = torch.where(fits, best, -1).to(torch.int32)
    return opened
