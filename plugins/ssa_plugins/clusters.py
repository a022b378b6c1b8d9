"""``clusters``: keys of the k-means clusters whose centroids fit a query best, and its own segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.plugin import (
    ConfigError,
    LayerSpec,
    NeighborSource,
    Ranges,
    Registrar,
    RoutingContext,
    cluster_keys,
    hookimpl,
    rank_clusters,
)


class Clusters(NeighborSource):
    """The sequence is cut into segments, and the keys of each full segment into clusters by k-means.

    A query looks at the clusters with the highest ``q·centroid``, up to a number of keys, and at all keys of the
    segment that it stands in; the neighbors are those of them with the highest exact ``q·k``. In causal attention it
    looks at clusters of earlier segments and at its own segment up to itself. A segment is clustered when it is full
    and never again, so nothing depends on what comes later. Where attention is not causal, a query looks at the
    clusters of all segments and at the keys that fill none.

    Segments count the real keys of a document: they never cross a document's border or hold padding.

    Args:
        segment: keys of a segment; where attention is not causal, about, so that few keys are left over.
        cluster: keys per centroid.
        keys: how many keys of clusters a query looks at, at most; twice ``num_neighbors`` if left out.
        iterations: Lloyd steps.

    Ranking the clusters compares a query with one centroid for every ``cluster`` keys, which `keys_scored` leaves out.
    """

    def __init__(
        self,
        layer: LayerSpec,
        *,
        segment: int = 1024,
        cluster: int = 32,
        keys: int | None = None,
        iterations: int = 5,
    ) -> None:
        super().__init__(layer)
        keys = 2 * layer.num_neighbors if keys is None else keys
        for name, value, low in (("segment", segment, 1), ("cluster", cluster, 1), ("keys", keys, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"clusters: {name} must be an integer >= {low}, got {value!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ConfigError(f"clusters: iterations must be an integer >= 0, got {iterations!r}")
        if cluster > segment:
            raise ConfigError(f"clusters: a cluster of {cluster} keys is larger than a segment of {segment}")
        self.segment, self.cluster, self.keys, self.iterations = segment, cluster, keys, iterations

    def extra_repr(self) -> str:
        return f"segment={self.segment}, cluster={self.cluster}, keys={self.keys}, iterations={self.iterations}"

    def propose(self, ctx: RoutingContext) -> Ranges:
        if ctx.num_keys <= self.layer.num_neighbors:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        length = self._length(ctx)
        places = _Places.of(ctx, length)
        if not places.starts.shape[1]:  # not one full segment: every key of the document
            return places.ranges(ctx, None, None, None)
        shared = ctx.shared_k if places.order is None else _take(ctx.shared_k, places.order)
        count = max(1, round(length / self.cluster))
        capacity = min(2 * self.cluster, self.keys)  # the best cluster must always fit
        clusters = cluster_keys(shared, places.starts, length, count, iterations=self.iterations, capacity=capacity)
        slots = clusters.size.shape[2] // places.starts.shape[1]
        limits = (places.first * slots, places.stop * slots)
        # twice the mean: more would have to be uncommonly small
        most = max(1, -(-2 * self.keys // self.cluster))
        opened = rank_clusters(ctx.q, clusters, limits, self.keys, most)
        chosen = opened.clamp(min=0).long()

        def of_opened(table: Tensor) -> Tensor:
            table = ctx.per_graph_head(table)[:, :, None].expand(-1, -1, ctx.num_queries, -1)
            return torch.where(opened < 0, 0, table.gather(3, chosen))

        start, size = of_opened(clusters.start), of_opened(clusters.size)
        return places.ranges(ctx, clusters.order, start, start + size)

    def _length(self, ctx: RoutingContext) -> int:
        """Keys of a segment: as configured, or, for one document without causality, so that few are left over."""
        if ctx.causal or ctx.documents is not None or ctx.key_keep is not None:
            return self.segment
        return ctx.num_keys // max(1, round(ctx.num_keys / self.segment))


@dataclass(frozen=True)
class _Places:
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
    def of(cls, ctx: RoutingContext, length: int) -> _Places:
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

    def ranges(self, ctx: RoutingContext, clustered: Tensor | None, start: Tensor | None, end: Tensor | None) -> Ranges:
        """Slices of the clusters and, behind them in the same order, of the keys by place."""
        batch, heads = ctx.batch, ctx.graph_heads
        if self.order is None:
            by_place = torch.arange(ctx.num_keys, dtype=torch.int32, device=ctx.device)[None]
        else:
            by_place = self.order
        by_place = by_place[:, None].expand(batch, ctx.shared_k.shape[1], -1)
        shift = 0
        own, own_end = (x[:, None, :, None].expand(batch, heads, -1, 1) for x in (self.own, self.end))
        if clustered is None or start is None or end is None:
            order, starts, ends = by_place, own, own_end
        else:
            shift = clustered.shape[2]
            if self.order is not None:
                clustered = by_place.gather(2, clustered.long())
            order = torch.cat([clustered, by_place], dim=2)
            starts, ends = torch.cat([start, own + shift], dim=3), torch.cat([end, own_end + shift], dim=3)
        return Ranges(ctx.per_graph_head(order[:, :, None]), starts[:, :, :, None].int(), ends[:, :, :, None].int())


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


def _take(x: Tensor, order: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]`` at ``order [B or 1, M]`` along M."""
    index = order.long()[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("clusters", Clusters)
