"""Keys by document, cut into segments: what sources that route by segments share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ssa_framework.plugin import Clusters, ConfigError, Ranges, RoutingContext, rank_clusters

Attend = Literal["topk", "all"]


def check_attend(source: str, attend: str) -> Attend:
    """Raises `ConfigError`."""
    for known in get_args(Attend):
        if attend == known:
            return known
    raise ConfigError(f"{source}: attend must be 'topk' or 'all', got {attend!r}")


@dataclass(frozen=True)
class Places:
    """Keys by document and position, padding last, cut into segments.

    Attributes:
        order: int32 ``[B or 1, M]``, the key at each place; ``None`` = keys stand where they are.
        starts: int32 ``[B or 1, F]``, the place of the first key of every segment; -1 = not used.
        first, stop: int32 ``[B or 1, N]``: segments from first to stop - 1 are open to a query.
        own, end: int32 ``[B or 1, N]``: places from own to end - 1 hold the keys that it looks at one by one.
    """

    order: Tensor | None
    starts: Tensor
    first: Tensor
    stop: Tensor
    own: Tensor
    end: Tensor

    @classmethod
    def of(cls, ctx: RoutingContext, length: int) -> Places:
        keys = ctx.num_keys
        segments = keys // length
        if ctx.documents is None and ctx.key_keep is None:
            starts = torch.arange(segments, dtype=torch.int32, device=ctx.device)[None] * length
            end = (ctx.positions + 1).clamp(max=keys) if ctx.causal else torch.full_like(ctx.positions, keys)
            zero = torch.zeros_like(end)
            return cls(None, starts, zero, *_split(zero, end, length, ctx.causal), end)
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
        end = torch.where(of_queries < 0, begin, end)
        starts, before = _segments_of_documents(rank, count, keys, length, segments)
        begin, end = begin.int(), end.int()
        stop, own = _split(begin, end, length, ctx.causal)
        first = before.gather(1, of_queries.clamp(min=0)).int()
        return cls(order.int(), starts, first, first + stop, own, end)

    def open(
        self, ctx: RoutingContext, q: Tensor, clusters: Clusters, *, keys: int, about: int, attend: Attend
    ) -> Ranges:
        """The best clusters of the open segments, up to ``keys`` keys, and the query's own keys.

        Args:
            q: what is compared with the centroids, ``[B, G, N, ..]``.
            clusters: of the keys by place; every segment has as many slots. about: usual size of a cluster.
        """
        slots = clusters.size.shape[2] // self.starts.shape[1]
        # half the usual size on average would be uncommonly small
        most = max(1, -(-2 * keys // about))
        opened = rank_clusters(q, clusters, (self.first * slots, self.stop * slots), keys, most)
        chosen = opened.clamp(min=0).long()

        def of_opened(table: Tensor) -> Tensor:
            table = ctx.per_graph_head(table)[:, :, None].expand(-1, -1, ctx.num_queries, -1)
            return torch.where(opened < 0, 0, table.gather(3, chosen))

        start, size = of_opened(clusters.start), of_opened(clusters.size)
        return self.ranges(ctx, clusters.order, (start, start + size), attend=attend)

    def ranges(
        self,
        ctx: RoutingContext,
        clustered: Tensor | None = None,
        opened: tuple[Tensor, Tensor] | None = None,
        *,
        attend: Attend,
    ) -> Ranges:
        """Slices of the clusters and, behind them in the same order, of the keys by place."""
        by_place = self.order
        if by_place is None:
            by_place = torch.arange(ctx.num_keys, dtype=torch.int32, device=ctx.device)[None]
        by_place = by_place[:, None].expand(ctx.batch, ctx.shared_k.shape[1], -1)
        starts, ends = (x[:, None, :, None].expand(ctx.batch, ctx.graph_heads, -1, 1) for x in (self.own, self.end))
        order = by_place
        if clustered is not None and opened is not None:
            shift = clustered.shape[2]
            if self.order is not None:
                clustered = by_place.gather(2, clustered.long())
            order = torch.cat([clustered, by_place], dim=2)
            starts, ends = torch.cat([opened[0], starts + shift], dim=3), torch.cat([opened[1], ends + shift], dim=3)
        order, starts, ends = order[:, :, None], starts[:, :, :, None].int(), ends[:, :, :, None].int()
        return Ranges(ctx.per_graph_head(order), starts, ends, attend=attend)


def _split(begin: Tensor, end: Tensor, length: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Of the places from ``begin`` to ``end``: how many full segments a query may open, and where the rest begins."""
    size = end - begin
    # causal: a query that ends a segment still stands in it
    full = torch.div(size - 1 if causal else size, length, rounding_mode="floor").clamp(min=0)
    return full, begin + full * length


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
