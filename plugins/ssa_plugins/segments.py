"""Keys by document, cut into segments, and the clusters of segments that queries open."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssa_framework.plugin import (
    Clusters,
    Proposal,
    Ranges,
    RoutingContext,
    Spans,
    Summaries,
    cluster_members,
    rank_clusters,
)

Attend = Literal["topk", "all"]
"""What of the keys that a query looks at is attended."""


@dataclass(frozen=True)
class Places:
    """Keys by document and position, padding last, cut into segments.

    Attributes:
        order: int32 ``[B or 1, M]``, the key at each place; ``None`` = keys stand where they are.
        length: keys of a segment.
        starts: int32 ``[B or 1, F]``, the place of the first key of every segment; -1 = not used.
        first, stop: int32 ``[B or 1, N]``: segments from first to stop - 1 are open to a query.
        begin, end: int32 ``[B or 1, N]``: places from begin to end - 1 hold all keys that a query may look at.
    """

    order: Tensor | None
    length: int
    starts: Tensor
    first: Tensor
    stop: Tensor
    begin: Tensor
    end: Tensor

    @property
    def own(self) -> Tensor:
        """int32 ``[B or 1, N]``: places from own to end - 1 hold the keys that a query looks at one by one."""
        return self.begin + (self.stop - self.first) * self.length

    @classmethod
    def of(cls, ctx: RoutingContext, lengths: Sequence[int]) -> list[Places]:
        """For each length of a segment, ascending; at least for the first, and not where there is no full segment."""
        keys = ctx.num_keys
        # a query that ends a segment still stands in it, so that a segment behind all others is open to nobody
        open_keys = max(0, keys - 1 if ctx.causal else keys)
        lengths = [lengths[0], *(length for length in lengths[1:] if length <= open_keys)]
        if ctx.documents is None and ctx.key_keep is None:
            end = (ctx.positions + 1).clamp(max=keys) if ctx.causal else torch.full_like(ctx.positions, keys)
            begin = torch.zeros_like(end)
            size = (end - 1).clamp(min=0) if ctx.causal else end
            return [
                cls(
                    None,
                    length,
                    torch.arange(0, open_keys // length * length, length, dtype=torch.int32, device=ctx.device)[None],
                    begin,
                    torch.div(size, length, rounding_mode="floor"),
                    begin,
                    end,
                )
                for length in lengths
            ]
        documents = ctx.documents
        of_keys = torch.zeros((1, keys), dtype=torch.int64, device=ctx.device)
        of_queries = torch.zeros((1, ctx.num_queries), dtype=torch.int64, device=ctx.device)
        if documents is not None:
            of_queries, of_keys = documents[0].long(), documents[1].long()
        count = 1 if documents is None else documents[2]
        places = torch.arange(keys, device=ctx.device)[None]
        # one number that sorts by document, then position; padding comes after all documents
        rank = of_keys * (keys + 1) + places
        if ctx.key_keep is not None:
            rank = torch.where(ctx.key_keep, rank, count * (keys + 1) + places)
        rank, order = rank.sort(dim=1)
        rows = rank.shape[0]
        of_queries = of_queries.expand(rows, -1) if of_queries.shape[0] == 1 else of_queries
        if of_queries.shape[0] > rows:
            rank, order = rank.expand(of_queries.shape[0], -1).contiguous(), order.expand(of_queries.shape[0], -1)
        begin = torch.searchsorted(rank, of_queries.contiguous() * (keys + 1))
        reach = ctx.positions.long() if ctx.causal else torch.full_like(ctx.positions, keys - 1, dtype=torch.int64)
        end = torch.searchsorted(rank, (of_queries * (keys + 1) + reach).contiguous(), right=True)
        end = torch.where(of_queries < 0, begin, end).int()
        begin, order, document = begin.int(), order.int(), of_queries.clamp(min=0)
        size = (end - begin - 1 if ctx.causal else end - begin).clamp(min=0)
        found = []
        for length in lengths:
            starts, before = _segments_of_documents(rank, count, keys, length, open_keys // length)
            first = before.gather(1, document).int()
            stop = first + torch.div(size, length, rounding_mode="floor")
            found.append(cls(order, length, starts, first, stop, begin, end))
        return found

    def best_of(self, ctx: RoutingContext, opened: Opened | None) -> Ranges:
        """Opened clusters and, behind them in the same order, the own keys, of which the best are attended."""
        order = self.by_place(ctx)
        start, end = (x[:, None, :, None].expand(ctx.batch, ctx.graph_heads, -1, 1) for x in (self.own, self.end))
        if opened is not None:
            shift = opened.order.shape[2]
            order = torch.cat([opened.order, order], dim=2)
            start, end = torch.cat([opened.start, start + shift], dim=3), torch.cat([opened.end, end + shift], dim=3)
        return Ranges(ctx.per_graph_head(order)[:, :, None], start[:, :, :, None], end[:, :, :, None])

    def whole(self, ctx: RoutingContext, opened: Opened | None) -> list[Proposal]:
        """The own keys and all keys of opened clusters."""
        proposals: list[Proposal] = [Spans(*self._own_span(ctx))]
        if opened is not None:
            order = ctx.per_graph_head(opened.order)[:, :, None]
            proposals.append(Ranges(order, opened.start[:, :, :, None], opened.end[:, :, :, None], attend="all"))
        return proposals

    def _own_span(self, ctx: RoutingContext) -> tuple[Tensor, Tensor]:
        """First and one past the last position of the own keys; keys of other documents may lie between."""
        own = self.own
        if self.order is None or not ctx.num_keys:
            return own, self.end
        some = self.end > own
        rows = max(self.order.shape[0], own.shape[0])
        order = self.order.expand(rows, -1)

        def key_at(place: Tensor) -> Tensor:
            return order.gather(1, place.clamp(0, ctx.num_keys - 1).long().expand(rows, -1))

        return torch.where(some, key_at(own), 0), torch.where(some, key_at(self.end - 1) + 1, 0)

    def by_place(self, ctx: RoutingContext) -> Tensor:
        """The key at each place, int32 ``[B, Hkv, M]``."""
        order = self.order
        if order is None:
            order = torch.arange(ctx.num_keys, dtype=torch.int32, device=ctx.device)[None]
        return order[:, None].expand(ctx.batch, ctx.shared_k.shape[1], -1)


@dataclass(frozen=True)
class Level:
    """Clusters of segments of one length, and which of them each query sees.

    Attributes:
        clusters: of the keys by place; ``centroids`` are what queries are compared with.
        order: int32 ``[B, Hkv, L]``, the keys (not places) cluster by cluster.
        first, stop: int32 ``[B or 1, N]``: a query sees the clusters from ``first`` to ``stop - 1``.
    """

    clusters: Clusters
    order: Tensor
    first: Tensor
    stop: Tensor

    @classmethod
    def of(cls, ctx: RoutingContext, places: Places, clusters: Clusters, first: Tensor) -> Level:
        """The clusters of the segments of ``places``, as many slots for each; ``first``: the first segment that a
        query sees."""
        slots = clusters.size.shape[2] // places.starts.shape[1]
        order = clusters.order
        if places.order is not None:
            order = places.by_place(ctx).gather(2, order.long())
        return cls(clusters, order, first * slots, places.stop * slots)

    def members(self, num_keys: int, start: int = 0) -> Tensor:
        """The number of the cluster of each key, from ``start`` on, int32 ``[B, Hkv, M]``, -1 = none."""
        return cluster_members(self.order, self.clusters.start, self.clusters.size, num_keys, start)


@dataclass(frozen=True)
class Opened:
    """Clusters that queries look into, of all levels; levels follow one another in the numbers and in the order.

    Attributes:
        levels: the clusters.
        order: int32 ``[B, Hkv, L]``, the keys level by level, cluster by cluster.
        numbers: int32 ``[B, G, N, P]``, -1 = none.
        start, end: int32 ``[B, G, N, P]``, slices of ``order``.
        first, stop: int32 ``[B or 1, N, R]``, the clusters that a query sees of each level.
    """

    levels: list[Level]
    order: Tensor
    numbers: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    stop: Tensor

    @classmethod
    def best(
        cls, ctx: RoutingContext, q: Tensor, levels: list[Level], *, keys: int, most: int, spread: float
    ) -> Opened:
        """The clusters whose centroids fit each query best, up to ``keys`` keys and ``most`` clusters.

        Args:
            q: what is compared with the centroids, ``[B, G, N, ..]``.
            spread: what the variances of clusters count, as in `rank_clusters`.
        """
        numbers = [0, *itertools.accumulate(level.clusters.size.shape[2] for level in levels)]
        places = [0, *itertools.accumulate(level.order.shape[2] for level in levels)]
        variances = [level.clusters.variances for level in levels if level.clusters.variances is not None]
        clusters = Clusters(
            torch.cat([level.order for level in levels], dim=2),
            torch.cat([level.clusters.start + at for level, at in zip(levels, places, strict=False)], dim=2),
            torch.cat([level.clusters.size for level in levels], dim=2),
            torch.cat([level.clusters.centroids for level in levels], dim=2),
            torch.cat(variances, dim=2) if len(variances) == len(levels) else None,
        )
        first = torch.stack([level.first + at for level, at in zip(levels, numbers, strict=False)], dim=-1)
        stop = torch.stack([level.stop + at for level, at in zip(levels, numbers, strict=False)], dim=-1)
        first = torch.minimum(first, stop)
        opened = rank_clusters(q, clusters, (first, stop), keys, most, spread, disjoint=True)
        return cls(levels, clusters.order, opened.numbers, opened.start, opened.end, first, stop)

    def summaries(self, num_keys: int) -> Summaries:
        """A summary of every cluster, for queries that see it and did not open it."""
        members, count = [], 0
        for level in self.levels:
            members.append(level.members(num_keys, count))
            count += level.clusters.size.shape[2]
        return Summaries(torch.stack(members, dim=2), count, self.first, self.stop, self.numbers)


def _segments_of_documents(rank: Tensor, count: int, keys: int, length: int, segments: int) -> tuple[Tensor, Tensor]:
    """First place of every full segment, int32 ``[B or 1, segments]``, -1 = not used, and the number of the first
    segment of every document, int64 ``[B or 1, count]``."""
    rows, device = rank.shape[0], rank.device
    borders = torch.arange(count + 1, device=device).expand(rows, -1).contiguous() * (keys + 1)
    first = torch.searchsorted(rank, borders)
    full = torch.div(first[:, 1:] - first[:, :-1], length, rounding_mode="floor")
    after = full.cumsum(1)
    number = torch.arange(segments, device=device).expand(rows, -1).contiguous()
    document = torch.searchsorted(after, number, right=True)
    inside = document < count
    document = document.clamp(max=count - 1)
    before = after - full
    starts = first.gather(1, document) + (number - before.gather(1, document)) * length
    return torch.where(inside, starts, -1).int(), before


def take(x: Tensor, order: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]`` at ``order [B or 1, M]`` along M."""
    index = order.long()[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
