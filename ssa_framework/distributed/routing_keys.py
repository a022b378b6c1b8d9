"""What routing reads of keys that lie on other ranks: the keys, or clusters that their ranks made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, pack_bits, unpack_bits
from ssa_framework.distributed.layout import SequenceLayout
from ssa_framework.distributed.needs import covered
from ssa_framework.distributed.rows import RowExchange
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.cluster_keys.types import Clusters


@dataclass(frozen=True)
class Reach:
    """Which keys the queries of each rank may attend by causality, padding and documents; what they choose aside."""

    layout: SequenceLayout
    causal: bool
    key_keep: Tensor | None
    key_segments: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, layout: SequenceLayout, mask: EdgeMask) -> Reach:
        return cls(layout, mask.causal, mask.key_keep, mask.key_segments, mask.positions.device)

    def keys(self, rank: int) -> Tensor:
        """Keys within reach of some query of ``rank``, bool ``[B or 1, M]``."""
        place = torch.arange(self.layout.length, device=self.device)[None]
        queries = self.layout.positions(rank, self.device)
        if self._documents is None:
            last = int(queries[-1]) if self.causal and queries.numel() else self.layout.length
            within = place <= last
        else:
            number, count = self._documents
            rows = number.shape[0]
            reach = queries if self.causal else torch.full_like(queries, self.layout.length)
            lasts = torch.full((rows, count), -1, dtype=torch.int64, device=self.device)
            lasts.scatter_reduce_(1, number[:, queries], reach.expand(rows, -1), "amax")
            within = lasts.gather(1, number) >= place
        return within if self.key_keep is None else within & self.key_keep

    @cached_property
    def _documents(self) -> tuple[Tensor, int] | None:
        """The number of each key's document, int64 ``[B or 1, M]``, and how many there are."""
        if self.key_segments is None:
            return None
        names, number = torch.unique(self.key_segments, return_inverse=True)
        return number, names.numel()


def gather_keys(ranks: Ranks, reach: Reach, k: Tensor, everything: bool) -> Tensor:
    """``k [B, Hkv, N / W, D]`` of every rank → ``[B, Hkv, N, D]``; zeros for keys beyond the reach of this rank, unless
    ``everything`` is asked for."""
    batch, heads, local, dim = k.shape
    layout = reach.layout
    here = layout.positions(ranks.rank, k.device)
    if everything:
        return layout.in_order(torch.cat(list(ranks.all_gather(k, "keys for routing")), dim=2), 2)
    mine = reach.keys(ranks.rank)
    head = torch.arange(batch * heads, device=k.device).view(batch, heads, 1)
    send, receive = [], []
    for rank in range(ranks.size):
        theirs = reach.keys(rank)[:, None, here].expand(batch, heads, -1)
        send.append(theirs.flatten().nonzero()[:, 0])
        positions = layout.positions(rank, k.device)
        wanted = mine[:, None, positions].expand(batch, heads, -1)
        receive.append((head * layout.length + positions)[wanted])
    exchange = RowExchange(ranks, tuple(send), tuple(receive), batch * heads * layout.length)
    table = exchange.fetch(k.reshape(batch * heads * local, dim), "keys for routing")
    return table.view(batch, heads, layout.length, dim)


@dataclass(frozen=True)
class SegmentsOfRanks:
    """Every rank clusters some segments, fetching the keys that it lacks, and sends what others look at. See
    `ssa_framework.source.SpreadSegments`."""

    layout: SequenceLayout
    ranks: Ranks
    k: Tensor

    def clusters(
        self,
        order: Tensor | None,
        starts: Tensor,
        length: int,
        slots: int,
        seen: tuple[Tensor, Tensor],
        cluster: Callable[[Tensor, Tensor], Clusters],
    ) -> Clusters:
        batch, heads = self.k.shape[:2]
        rows, segments = starts.shape
        device = starts.device
        inside = torch.arange(length, device=device)
        first, stop = (x[:, None, :, None] for x in seen)
        looked_at = covered(first, stop, segments)[:, 0]  # [B or 1, F]
        owner = self._owners(order, starts, length, looked_at)
        # the segments that each rank clusters, [rows, Fmax], -1 = fewer than others
        most = max(1, *(int((owner == rank).sum(1).max()) for rank in range(self.ranks.size)))
        tasks = torch.stack([_first_true(owner == rank, most) for rank in range(self.ranks.size)])  # [W, rows, Fmax]
        mine = tasks[self.ranks.rank]
        # what is not used is any segment, which is masked below
        places = starts.clamp(min=0).long().gather(1, mine.clamp(min=0))[..., None] + inside  # [rows, Fmax, L]
        keys = places if order is None else order.long().expand(rows, -1).gather(1, places.flatten(1)).view_as(places)
        table = self._fetch_keys(torch.where(mine[..., None] >= 0, keys, -1).flatten(1))
        begin = torch.arange(most, dtype=torch.int32, device=device) * length
        made = cluster(table, torch.where(mine >= 0, begin, -1).int())

        narrow = torch.int16 if length < 2**15 else torch.int32
        sizes = made.size.view(batch, heads, most, slots)
        offsets = (made.order.view(batch, heads, most, length) - begin[:, None]).clamp(min=0)
        of_rank = tasks[:, :, None].expand(-1, batch, heads, -1)  # [W, B, Hkv, Fmax]
        record = torch.cat([sizes, offsets], dim=3).to(narrow)[of_rank[self.ranks.rank] >= 0]
        counts = (of_rank >= 0).flatten(1).sum(1).tolist()
        gathered = self.ranks.all_gather_rows(record, counts, "clusters for routing").int()
        head = torch.arange(batch * heads, device=device).view(batch, heads, 1) * segments
        target = (head + of_rank)[of_rank >= 0]
        whole = torch.zeros((batch * heads * segments, slots + length), dtype=torch.int32, device=device)
        whole.index_copy_(0, target, gathered)
        size, offset = whole.view(batch, heads, segments, -1).split([slots, length], dim=3)
        first_place = starts.clamp(min=0)[:, None, :, None]
        by_place = torch.where(starts[:, None, :, None] >= 0, first_place + offset, 0)
        start = size.cumsum(3) - size + torch.arange(segments, device=device)[:, None] * length
        start = torch.where(size > 0, start, 0).int()
        needed = looked_at[:, None, :, None] & (size > 0)
        centroids, variances = self._fetch_centroids(made, needed, tasks)
        return Clusters(by_place.flatten(2).int(), start.flatten(2), size.flatten(2), centroids, variances)

    def _owners(self, order: Tensor | None, starts: Tensor, length: int, looked_at: Tensor) -> Tensor:
        """The rank that clusters each segment, the one that holds its middle key, int64 ``[B or 1, F]``; -1 = none,
        where no rank looks at it."""
        somewhere = self.ranks.all_gather(pack_bits(looked_at.flatten()), "requests")
        looked_at = torch.stack([unpack_bits(bits, looked_at.numel()) for bits in somewhere]).any(0).view_as(looked_at)
        if starts.shape[0] < looked_at.shape[0]:
            looked_at = looked_at.any(0, keepdim=True)
        middle = starts.clamp(min=0).long() + length // 2
        if order is not None:
            middle = order.long().expand(starts.shape[0], -1).gather(1, middle)
        return torch.where((starts >= 0) & looked_at, self.layout.rank_of(middle), -1)

    def _fetch_keys(self, keys: Tensor) -> Tensor:
        """The keys ``[B or 1, P]``, -1 = none, each at most once, ``[B, Hkv, P, D]``."""
        batch, heads, local, dim = self.k.shape
        count = keys.shape[1]
        place = torch.full((keys.shape[0], self.layout.length + 1), -1, dtype=torch.int64, device=keys.device)
        slot = torch.arange(count, device=keys.device).expand(keys.shape[0], -1)
        place.scatter_(1, torch.where(keys < 0, self.layout.length, keys), slot)
        head = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1) * count
        wanted, places = [], []
        for rank in range(self.ranks.size):
            at = place[:, None, self.layout.positions(rank, keys.device)].expand(batch, heads, -1)
            wanted.append((at >= 0).flatten())
            places.append((head + at)[at >= 0])
        exchange = RowExchange.of_requests(self.ranks, wanted, places, batch * heads * count)
        table = exchange.fetch(self.k.reshape(batch * heads * local, dim), "keys for routing")
        return table.view(batch, heads, count, dim)

    def _fetch_centroids(self, made: Clusters, needed: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Centroids and variances of the segments that some query of this rank sees, zeros for the others.

        Args:
            made: of the segments of this rank. needed: bool ``[B, Hkv, F, C]``. tasks: int64 ``[W, B or 1, Fmax]``,
            the segments of every rank.
        """
        batch, heads, segments, slots = needed.shape
        padded = torch.nn.functional.pad(needed, (0, 0, 0, 1))  # the segment after the last is none
        number = torch.arange(batch * heads, device=needed.device).view(batch, heads, 1, 1) * segments
        slot = torch.arange(slots, device=needed.device)
        wanted, places = [], []
        for task in tasks:
            index = torch.where(task < 0, segments, task).expand(batch, -1)[:, None, :, None]
            mine = padded.gather(2, index.expand(-1, heads, -1, slots))  # [B, Hkv, Fmax, C]
            wanted.append(mine.flatten())
            places.append(((number + index) * slots + slot)[mine])
        exchange = RowExchange.of_requests(self.ranks, wanted, places, batch * heads * segments * slots)
        rows = made.centroids if made.variances is None else torch.cat([made.centroids, made.variances], dim=-1)
        table = exchange.fetch(rows.flatten(0, 2), "clusters for routing").view(batch, heads, segments * slots, -1)
        if made.variances is None:
            return table, None
        centroids, variances = table.chunk(2, dim=-1)
        return centroids.contiguous(), variances.contiguous()


def _first_true(mask: Tensor, count: int) -> Tensor:
    """Numbers of the first ``count`` true elements of each row of bool ``[R, F]``, int64 ``[R, count]``, -1 = fewer."""
    number = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    ordered = torch.where(mask, number, mask.shape[1]).sort(dim=1).values[:, :count]
    return torch.where(ordered < mask.shape[1], ordered, -1)
