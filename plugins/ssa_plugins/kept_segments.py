"""`KeptSegments`: what sources that route by segments keep of the keys in a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.plugin import Clusters, KeptClusters, Proposal, Ranges, RoutingContext, Spans, Summaries
from ssa_plugins.segments import Attend

_Numbers = tuple[tuple[int, ...], tuple[int, ...]]
"""The segments that a query sees of each level, from first to stop - 1."""

Cluster = Callable[[int, Tensor, Tensor], Clusters]
"""Clusters of the segments of a level, from their keys, floating ``[B, Hkv, M, D]``, and where they begin, int32
``[1, F]``."""


class KeptSegments:
    """Keys of a cache by place, which leaves padding out, cut into segments, and the clusters of those that are full.

    Args:
        ctx: says how many batch elements and heads there are.
        levels: keys of a segment and slots of a segment, of each level.
        dim: of centroids. variances: clusters have them.
    """

    def __init__(
        self, ctx: RoutingContext, levels: Sequence[tuple[int, int]], dim: int, *, variances: bool = False
    ) -> None:
        self.levels = list(levels)
        self.clusters = KeptClusters(
            levels, ctx.batch, ctx.shared_k.shape[1], dim, variances=variances, device=ctx.device
        )
        self.counts = [0] * ctx.batch
        """Real keys of every batch element."""
        self.places: Tensor | None = None
        """int32 ``[B, room]``, the key at each place; ``None`` = keys stand where they are."""
        self._last: tuple[_Numbers, torch.device, tuple[Tensor, Tensor, Tensor]] | None = None

    # -- keys come and go ----------------------------------------------------------------------------------------

    def append(self, ctx: RoutingContext, cluster: Cluster) -> None:
        """Take in the keys from ``ctx.first_new`` on, and cluster the segments that are full now."""
        before = list(self.counts)
        if ctx.key_keep is None:
            self.counts = [count + ctx.num_keys - ctx.first_new for count in self.counts]
        else:
            self._place(ctx.key_keep[:, ctx.first_new :].expand(ctx.batch, -1), ctx.first_new)
        for level, (length, _) in enumerate(self.levels):
            if self.places is None:
                self._cluster(ctx, cluster, level, before[0] // length, self.counts[0] // length, None)
            else:
                for element, (old, new) in enumerate(zip(before, self.counts, strict=True)):
                    self._cluster(ctx, cluster, level, old // length, new // length, element)

    def _place(self, keep: Tensor, first_new: int) -> None:
        """Give real keys the next places."""
        batch, new = keep.shape
        if self.places is None:
            self.places = torch.arange(first_new, dtype=torch.int32, device=keep.device).expand(batch, -1)
        room = max(self.counts) + new
        if room > self.places.shape[1]:
            self.places = torch.nn.functional.pad(self.places, (0, 2 * room - self.places.shape[1]))
        element, column = keep.nonzero(as_tuple=True)
        counts = torch.tensor(self.counts, device=keep.device)
        place = counts[element] + (keep.cumsum(1) - 1)[element, column]
        self.places[element, place] = (first_new + column).int()
        self.counts = (counts + keep.sum(1)).tolist()

    def _cluster(
        self, ctx: RoutingContext, cluster: Cluster, level: int, first: int, last: int, element: int | None
    ) -> None:
        """Cluster the segments ``first .. last`` of a level, of all batch elements or of one."""
        if first >= last:
            return
        length = self.levels[level][0]
        begin, end = first * length, last * length
        starts = torch.arange(0, end - begin, length, dtype=torch.int32, device=ctx.device)[None]
        if element is None or self.places is None:
            made = cluster(level, ctx.shared_k[:, :, begin:end], starts)
            self.clusters.add(level, first, replace(made, order=made.order + begin))
        else:
            places = self.places[element, begin:end]
            made = cluster(level, ctx.shared_k[element : element + 1, :, places.long()], starts)
            self.clusters.add(level, first, replace(made, order=places[made.order.long()]), element)

    def crop(self, length: int) -> None:
        """Drop the keys from position ``length`` on."""
        if self.places is None:
            self.counts = [min(count, length) for count in self.counts]
        else:
            self.counts = [
                int((places[:count] < length).sum()) for places, count in zip(self.places, self.counts, strict=True)
            ]
            for places, count in zip(self.places, self.counts, strict=True):
                places[count:] = 0
        for level, (segment, _) in enumerate(self.levels):
            for element, count in enumerate(self.counts):
                self.clusters.crop(level, count // segment, element)

    def reorder(self, index: Tensor) -> None:
        """Replace the batch elements by those at ``index``."""
        self.counts = [self.counts[i] for i in index.tolist()]
        self.places = None if self.places is None else self.places.index_select(0, index)
        self.clusters.reorder(index)

    def steady_steps(self, length: int) -> int:
        """See `NeighborSource.steady_steps`: until the next segment is full, once it has begun."""
        segment = self.levels[0][0]
        if self.places is not None or length < segment or length % segment == 0:
            return 0
        return segment - 1 - length % segment

    # -- queries -------------------------------------------------------------------------------------------------

    def propose(
        self, ctx: RoutingContext, q: Tensor, *, keys: int, most: int, spread: float, attend: Attend, summaries: bool
    ) -> list[Proposal]:
        """The own keys of every query, the clusters that it opens, and summaries of the others.

        Args:
            q, keys, most, spread: as in `ssa_plugins.segments.Opened.best`.
            attend: to ``"all"`` of these keys, or to the best.
        """
        single = self.places is None and ctx.num_queries == 1 and ctx.mask.offset is not None
        numbers = self._numbers(ctx.mask.offset) if single and ctx.mask.offset is not None else None
        end, own, first, stop = self._seen(ctx) if numbers is None else self._seen_by_one(ctx, numbers)
        proposals: list[Proposal] = [self._own(own, end, attend)]
        if max(self.counts) < self.levels[0][0]:
            return proposals
        opened, low, high = self.clusters.rank(q, first, stop, keys, most, spread)
        begin, close = opened.start.unsqueeze(3), opened.end.unsqueeze(3)
        proposals.append(Ranges(self.clusters.order, begin, close, attend=attend))
        if summaries:
            members = self.clusters.reach(ctx.num_keys)
            seen = None
            if numbers is not None:
                seen = self.clusters.first_slots(numbers[0]), self.clusters.first_slots(numbers[1])
            proposals.append(Summaries(members, self.clusters.count, low, high, opened.numbers, seen=seen))
        return proposals

    @property
    def _ratios(self) -> list[int]:
        """How many segments of each level one of the next level has."""
        return [after // before for (before, _), (after, _) in itertools.pairwise(self.levels)]

    def _numbers(self, position: int) -> _Numbers:
        """What `_seen` finds for the query at ``position``."""
        stops = [position // length for length, _ in self.levels]
        firsts = [n * ratio for n, ratio in zip(stops[1:], self._ratios, strict=True)] + [0]
        return tuple(firsts), tuple(stops)

    def _seen_by_one(self, ctx: RoutingContext, numbers: _Numbers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for a decode step: until a segment is full, only the last place changes."""
        if self._last is None or self._last[:2] != (numbers, ctx.device):
            firsts, stops = numbers
            own = torch.tensor([[stops[0] * self.levels[0][0]]], dtype=torch.int32, device=ctx.device)
            segments = torch.tensor([[[firsts]], [[stops]]], dtype=torch.int32, device=ctx.device)
            self._last = numbers, ctx.device, (own, segments[0], segments[1])
        own, first, stop = self._last[2]
        return ctx.positions + 1, own, first, stop

    def _seen(self, ctx: RoutingContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One past the last place of every query and the first of its own segment, int32 ``[B or 1, N]``, and the
        segments that it sees of each level, from first to stop - 1, ``[B or 1, N, R]``."""
        ratios = self._ratios
        end = self._ends(ctx)
        full = [((end - 1) // length).clamp_(min=0) for length, _ in self.levels]
        above = [n * ratio for n, ratio in zip(full[1:], ratios, strict=True)]
        stop = torch.stack(full, dim=-1)
        first = torch.minimum(torch.stack([*above, torch.zeros_like(end)], dim=-1), stop)
        return end, full[0] * self.levels[0][0], first, stop

    def _ends(self, ctx: RoutingContext) -> Tensor:
        """int32 ``[B or 1, N]``: a query may look at the places before."""
        if self.places is None or ctx.key_keep is None:
            return ctx.positions + 1
        keep = ctx.key_keep[:, ctx.num_keys - ctx.num_queries :].expand(ctx.batch, -1)
        before = torch.tensor(self.counts, device=keep.device) - keep.sum(1)
        return (before[:, None] + keep.cumsum(1)).int()

    def _own(self, own: Tensor, end: Tensor, attend: Attend) -> Proposal:
        """The keys that each query looks at one by one."""
        if attend == "topk":
            order = None if self.places is None else self.places[:, None, None]
            return Ranges(order, own[:, None, :, None, None], end[:, None, :, None, None])
        if self.places is None:
            return Spans(own, end)
        last = self.places.shape[1] - 1
        first = self.places.gather(1, own.clamp(max=last).long())
        after = self.places.gather(1, (end - 1).clamp(min=0).long()) + 1
        some = end > own
        return Spans(torch.where(some, first, 0), torch.where(some, after, 0))
