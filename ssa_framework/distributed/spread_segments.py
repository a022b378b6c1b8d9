"""Clusters of segments whose keys lie on several ranks: each rank makes some of them, and sends what others look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, on_host, pack_bits, unpack_bits
from ssa_framework.distributed.layout import SequenceLayout
from ssa_framework.distributed.needs import counted_before, covered, true_places
from ssa_framework.distributed.rows import RowExchange, RowMasks
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.source import SpreadLevel


@dataclass(frozen=True)
class SegmentsOfRanks:
    """Every rank clusters some segments, fetching the keys that it lacks, and sends what others look at; all levels at
    once. See `ssa_framework.source.SpreadSegments`."""

    layout: SequenceLayout
    ranks: Ranks
    k: Tensor

    def clusters(self, order: Tensor | None, levels: Sequence[SpreadLevel]) -> list[Clusters]:
        shares = self._shares(order, levels)
        keys, begins, counts = self._fetch_keys(order, levels, shares)
        parts = [
            _Part.of(*of_level, self.ranks.rank, keys) for of_level in zip(levels, shares, begins, counts, strict=True)
        ]
        members = self._gather_members(parts)
        tables = self._fetch_centroids(parts, [size for size, _ in members])
        return [part.whole(*its, table) for part, its, table in zip(parts, members, tables, strict=True)]

    def _shares(self, order: Tensor | None, levels: Sequence[SpreadLevel]) -> list[_Share]:
        """Who clusters which segments of each level, the rank that holds their middle key, and who looks at them."""
        segments = [level.starts.shape[1] for level in levels]
        *before, total = itertools.accumulate(segments, initial=0)
        first, stop = (
            torch.stack([bound + at for bound, at in zip(bounds, before, strict=True)], dim=2)[:, None]
            for bounds in ([level.first for level in levels], [level.stop for level in levels])
        )
        here = covered(first, stop, total)[:, 0]  # [B or 1, F], of all levels
        bits = self.ranks.all_gather(pack_bits(here.flatten()), "requests")
        looked_at = unpack_bits(bits, here.numel()).unflatten(1, here.shape)
        starts = torch.cat([level.starts for level in levels], dim=1)
        somebody = looked_at.any(0)
        if starts.shape[0] < here.shape[0]:
            somebody = somebody.any(0, keepdim=True)
        middle = torch.cat([level.starts + level.length // 2 for level in levels], dim=1).clamp(min=0).long()
        if order is not None:
            middle = order.long().expand(starts.shape[0], -1).gather(1, middle)
        owner = torch.where((starts >= 0) & somebody, self.layout.rank_of(middle), -1)
        owned = owner == torch.arange(self.ranks.size, device=owner.device).view(-1, 1, 1)
        rank = self.ranks.rank
        of_levels = (x.split(segments, dim=2) for x in (owned, owned[rank] & looked_at, owned & looked_at[rank]))
        return [_Share(*share) for share in zip(*of_levels, strict=True)]

    def _fetch_keys(
        self, order: Tensor | None, levels: Sequence[SpreadLevel], shares: list[_Share]
    ) -> tuple[Tensor, list[Tensor], list[list[int]]]:
        """The keys of the segments that this rank clusters, by place, ``[B, Hkv, P, D]``; of each level, the row where
        each of them begins, int32 ``[B or 1, F]``, and how many segments each rank has in each row, ``[W, B or 1]``."""
        batch, heads, _, dim = self.k.shape
        mine = torch.cat([share.owned[self.ranks.rank] for share in shares], dim=1)
        starts = torch.cat([level.starts for level in levels], dim=1)
        ends = torch.cat([level.starts + level.length for level in levels], dim=1)
        needed = covered((starts * mine)[:, None, None], (ends * mine)[:, None, None], self.layout.length)[:, 0]
        before = counted_before(needed.any(0))  # a row for each place that some batch element needs
        row = before[:-1].expand_as(needed)
        if order is not None:  # by key
            places = order.long().expand_as(needed)
            needed, row = (torch.empty_like(x).scatter_(1, places, x) for x in (needed, row))
        wanted = self.layout.by_rank(needed)[:, :, None].expand(-1, batch, heads, -1).flatten(1)
        (masks,) = RowMasks.requested(self.ranks, wanted)
        (rows,), *found = on_host([before[-1:], *masks.ends, *(share.owned.sum(2) for share in shares)])
        rows = max(rows, *(level.length for level in levels))  # a segment that is not used has keys, too
        head = torch.arange(batch * heads, device=self.k.device).view(batch, heads, 1) * rows
        places = self.layout.by_rank(row)[:, :, None] + head
        exchange = RowExchange.of(self.ranks, masks, found[:2], batch * heads * rows, places=places)
        keys = exchange.fetch(self.k.flatten(0, 2), "keys for routing").view(batch, heads, rows, dim)
        begins = before[starts.clamp(min=0).long()].split([level.starts.shape[1] for level in levels], dim=1)
        return keys, list(begins), found[2:]

    def _gather_members(self, parts: list[_Part]) -> list[tuple[Tensor, Tensor]]:
        """Of each level, sizes of clusters ``[B, Hkv, F, C]`` and the keys of segments cluster by cluster, counted from
        the first one ``[B, Hkv, F, L]``, int32; zeros for segments that nobody clusters."""
        records = [part.records() for part in parts]
        sizes = [
            count * part.record_bytes
            for counts in zip(*(part.counts for part in parts), strict=True)
            for count, part in zip(counts, parts, strict=True)
        ]  # rank by rank, level by level
        levels = len(parts)
        totals = [sum(sizes[at : at + levels]) for at in range(0, len(sizes), levels)]
        gathered = self.ranks.all_gather_rows(torch.cat(records), totals, "clusters for routing").split(sizes)
        return [part.members(torch.cat(gathered[level::levels])) for level, part in enumerate(parts)]

    def _fetch_centroids(self, parts: list[_Part], sizes: list[Tensor]) -> list[Tensor]:
        """Of each level, centroids (and variances beside them) of the segments that some query of this rank looks at,
        ``[B, Hkv, F · C, ..]``; zeros for the others."""
        filled = [size > 0 for size in sizes]
        send, receive, sources = [], [], []
        before = 0
        for part, some in zip(parts, filled, strict=True):
            send.append((part.share.send[:, :, None, :, None] & some).flatten(1))
            receive.append((part.share.receive[:, :, None, :, None] & some).flatten(1))
            slots = torch.arange(before, before + part.level.slots, device=some.device)
            sources.append((part.rows[..., None] * part.level.slots + slots).flatten())
            before += part.made.size.numel()
        masks = RowMasks(torch.cat(send, dim=1), torch.cat(receive, dim=1))
        exchange = RowExchange.of(
            self.ranks, masks, on_host(masks.ends), masks.send.shape[1], sources=torch.cat(sources)
        )
        table = exchange.fetch(torch.cat([part.centroids() for part in parts]), "clusters for routing")
        return [
            rows.view(*some.flatten(2).shape, table.shape[1])
            for rows, some in zip(table.split([some.numel() for some in filled]), filled, strict=True)
        ]


@dataclass(frozen=True)
class _Share:
    """Segments of a level, bool ``[W, B or 1, F]``.

    Attributes:
        owned: those that each rank clusters.
        send: those of this rank that some query of each rank looks at.
        receive: those of each rank that some query of this one looks at.
    """

    owned: Tensor
    send: Tensor
    receive: Tensor


@dataclass(frozen=True)
class _Part:
    """The segments of a level that this rank clusters.

    Attributes:
        counts: segments of each rank, of all batch elements and heads.
        targets: int64, their numbers ``(b · Hkv + h) · F + f``, ascending, of one rank after the other.
        own: those of this rank.
        rows: int64 ``[B, Hkv, F]``, where each segment of this rank stands in what it clustered.
        made: the clusters of this rank.
        order: int32 ``[B, Hkv, F', L]``, their keys, counted from the first of the segment.
    """

    level: SpreadLevel
    share: _Share
    counts: list[int]
    targets: Tensor
    own: Tensor
    rows: Tensor
    made: Clusters
    order: Tensor

    @classmethod
    def of(
        cls, level: SpreadLevel, share: _Share, begins: Tensor, segments: list[int], rank: int, keys: Tensor
    ) -> _Part:
        """Cluster the segments of ``rank``.

        Args:
            begins: int32 ``[B or 1, F]``, the row of ``keys [B, Hkv, P, D]`` where each of them begins.
            segments: of each rank, ``[W, B or 1]``.
        """
        batch, heads = keys.shape[:2]
        rows = begins.shape[0]
        mine = share.owned[rank]
        most = max(1, *segments[rank * rows : (rank + 1) * rows])
        number = mine.cumsum(1) * mine  # from 1 on; 0 = not ours
        begin = begins.new_full((rows, 1 + most), -1).scatter_(1, number, begins)[:, 1:].contiguous()
        made = level.cluster(keys, begin)
        counts = [sum(segments[at : at + rows]) * (batch // rows) * heads for at in range(0, len(segments), rows)]
        everywhere = share.owned[:, :, None].expand(-1, batch, heads, -1)
        counted = everywhere.flatten().cumsum(0, dtype=torch.int32)
        targets = true_places(counted, sum(counts)).remainder_(everywhere[0].numel())
        before = torch.arange(-1, batch * heads * most - 1, most, device=keys.device).view(batch, heads, 1)
        order = made.order.view(batch, heads, most, level.length) - begin[:, None, :, None]
        return cls(level, share, counts, targets, targets.split(counts)[rank], before + number[:, None], made, order)

    @property
    def _record(self) -> tuple[int, torch.dtype]:
        """Numbers of what is sent of a segment, and their dtype."""
        length = self.level.length
        return self.level.slots + length, torch.int16 if length < 2**15 else torch.int32

    @property
    def record_bytes(self) -> int:
        width, dtype = self._record
        return width * dtype.itemsize

    def records(self) -> Tensor:
        """Sizes and order of the segments of this rank, uint8 ``[segments · record_bytes]``."""
        size = self.made.size.view(*self.order.shape[:3], -1)
        rows = self.rows.flatten().index_select(0, self.own)
        records = torch.cat([size, self.order], dim=3).flatten(0, 2).index_select(0, rows)
        return records.to(self._record[1]).flatten().view(torch.uint8)

    def members(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes ``[B, Hkv, F, C]`` and order ``[B, Hkv, F, L]`` of all segments, from the `records` of all ranks."""
        width, dtype = self._record
        whole = torch.zeros((self.rows.numel(), width), dtype=torch.int32, device=records.device)
        whole.index_copy_(0, self.targets, records.view(dtype).view(-1, width).int())
        size, order = whole.view(*self.rows.shape, width).split([self.level.slots, self.level.length], dim=3)
        return size, order

    def centroids(self) -> Tensor:
        """Centroids, and variances beside them, of the clusters of this rank."""
        made = self.made
        rows = made.centroids if made.variances is None else torch.cat([made.centroids, made.variances], dim=-1)
        return rows.flatten(0, 2)

    def whole(self, size: Tensor, order: Tensor, centroids: Tensor) -> Clusters:
        """The clusters of all segments, from their `members` and centroids ``[B, Hkv, F · C, ..]``."""
        segments, length = self.level.starts.shape[1], self.level.length
        by_place = self.level.starts.clamp(min=0)[:, None, :, None] + order
        first = torch.arange(0, segments * length, length, dtype=torch.int32, device=size.device)[:, None]
        start = (size.cumsum(3, dtype=torch.int32) - size + first) * (size > 0)
        variances = None
        if self.made.variances is not None:
            centroids, variances = (x.contiguous() for x in centroids.chunk(2, dim=-1))
        return Clusters(by_place.flatten(2), start.flatten(2), size.flatten(2), centroids, variances)
