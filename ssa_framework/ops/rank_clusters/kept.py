"""`KeptClusters`: clusters that are kept while their sequence grows, ranked for few queries without being moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters.api import rank_clusters
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_FEW = 8
"""Queries that are ranked against strips; more are worth a tile."""
_SMALLEST_ROOM = 2
_VIEWS = ("_strips", "_start", "_size", "_scratch_type")


class KeptClusters:
    """Clusters of segments of keys that fill one after the other, on R levels of segments of different lengths.

    Clusters have numbers, level by level: segment f of level r has the slots ``slot_at[r] + f * slots[r]`` and so on.
    Room for each level doubles when it is used up; only then do numbers change, and ``order`` becomes another tensor.

    Args:
        levels: keys of a segment and slots of a segment, of each level.
        batch, heads, dim: B, Hkv, D. variances: clusters have variances, which count.
        device: where everything lies.

    Attributes:
        order: int32 ``[B, Hkv, 1, L]``, the positions of the keys, level by level, cluster by cluster.
        start, size: int32 ``[B, Hkv, S]``, slices of ``order``; size 0 = no cluster.
        members: int32 ``[B, Hkv, R, room]``, the number of the cluster of each key on each level, -1 = none.
    """

    def __init__(
        self,
        levels: Sequence[tuple[int, int]],
        batch: int,
        heads: int,
        dim: int,
        *,
        variances: bool,
        device: torch.device,
    ) -> None:
        self.levels, self.heads, self.dim = list(levels), heads, dim
        self.room = [0] * len(self.levels)  # segments
        self.on_cpu, self.has_variances = device.type == "cpu", variances
        self.members = torch.full((batch, heads, len(self.levels), 0), -1, dtype=torch.int32, device=device)
        self._limits: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # the last segments, and their slots
        self._allocate(batch, device, [_SMALLEST_ROOM] * len(self.levels))

    def __getstate__(self) -> dict[str, Any]:
        # arrays are views of tensors, which a copy would tear apart
        return {name: kept for name, kept in vars(self).items() if name not in _VIEWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_arrays()

    @property
    def count(self) -> int:
        """S, slots of all levels."""
        return self.size.shape[2]

    def add(self, level: int, first: int, clusters: Clusters, batch: int | None = None) -> None:
        """Add the clusters of segments of one level, from segment ``first`` on.

        Args:
            clusters: of `cluster_keys`, ``[B, Hkv, ..]``; ``order`` holds positions in the whole sequence.
            batch: of this batch element only; ``[1, Hkv, ..]``.
        """
        length, each = self.levels[level]
        segments = clusters.size.shape[2] // each
        last = first + segments
        if last > self.room[level]:
            room = [max(2 * n, last) if r == level else n for r, n in enumerate(self.room)]
            self._allocate(self.order.shape[0], self.order.device, room)
        rows = slice(None) if batch is None else slice(batch, batch + 1)
        place, slot = self.place_at[level] + first * length, self.slot_at[level] + first * each
        places, slots = slice(place, place + segments * length), slice(slot, slot + segments * each)
        self.order[rows, :, 0, places] = clusters.order
        self.start[rows, :, slots] = clusters.start + place
        self.size[rows, :, slots] = clusters.size
        self.centroids[rows, :, slots] = clusters.centroids
        if self.has_variances:
            assert clusters.variances is not None
            self.variances[rows, :, slots] = clusters.variances
        self._mark_members(level, rows, clusters, slot)
        if self.on_cpu:
            self._fill_strips(level, first, last, range(self.order.shape[0]) if batch is None else (batch,))

    def crop(self, level: int, segments: int, batch: int) -> None:
        """Keep the first ``segments`` segments of a level of one batch element."""
        (length, each), slot, place = self.levels[level], self.slot_at[level], self.place_at[level]
        self.size[batch, :, slot + segments * each : slot + self.room[level] * each] = 0
        self.order[batch, :, 0, place + segments * length : place + self.room[level] * length] = 0
        members = self.members[batch, :, level]
        members.masked_fill_(members >= slot + segments * each, -1)

    def reorder(self, index: Tensor) -> None:
        """Replace the batch elements by those at ``index``."""
        for name in ("order", "start", "size", "centroids", "variances", "members", "numbers", "slots", "before"):
            kept: Tensor = getattr(self, name)
            setattr(self, name, kept.index_select(0, index))
        self._make_arrays()

    def rank(
        self, q: Tensor, first: Tensor, stop: Tensor, budget: int, most: int, spread: float
    ) -> tuple[OpenedClusters, Tensor, Tensor]:
        """The clusters that queries open; see `rank_clusters`.

        Args:
            q: ``[B, G, N, D]``. first, stop: int32 ``[B or 1, N, R]``: segments that a query sees of each level.

        Returns:
            Them, and the ranges of slots that belong to ``first`` and ``stop``, int32 ``[B or 1, N, R]``.
        """
        if self._limits is None or self._limits[0] is not first or self._limits[1] is not stop:
            self._limits = first, stop, self.slots_of(first), self.slots_of(stop)
        _, _, low, high = self._limits
        if self.on_cpu and q.shape[2] <= _FEW:
            return self._rank_few(q, first, stop, budget, most, spread), low, high
        variances = self.variances if self.has_variances else None
        clusters = Clusters(self.order[:, :, 0], self.start, self.size, self.centroids, variances)
        return rank_clusters(q, clusters, (low, high), budget, most, spread, disjoint=True), low, high

    def slots_of(self, segments: Tensor) -> Tensor:
        """The first slots of segments, int32 ``[.., R]``."""
        return segments * self._each + self._slot_at

    def first_slots(self, segments: Sequence[int]) -> tuple[int, ...]:
        """`slots_of` a segment of each level, in numbers."""
        return tuple(
            at + segment * each for at, segment, (_, each) in zip(self.slot_at, segments, self.levels, strict=True)
        )

    # -- room ----------------------------------------------------------------------------------------------------

    def _allocate(self, batch: int, device: torch.device, room: list[int]) -> None:
        """Make room for so many segments of each level, and move what is there."""
        before = dict(vars(self)) if any(self.room) else None
        self._limits = None
        lengths, each = [length for length, _ in self.levels], [slots for _, slots in self.levels]
        self.room, strips = room, [-(-n * c // 64) for n, c in zip(room, each, strict=True)]
        self.place_at, places = _offsets([n * c for n, c in zip(room, lengths, strict=True)])
        self.slot_at, slots = _offsets([n * c for n, c in zip(room, each, strict=True)])
        self.strip_at, all_strips = _offsets(strips)
        width = -(-self.dim // 16) * 16
        depth = width * (2 if self.has_variances else 1)
        lead = (batch, self.heads)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((*lead, *shape), dtype=dtype, device=device)

        self.order, self.start, self.size = zeros(1, places), zeros(slots), zeros(slots)
        self.centroids = zeros(slots, self.dim, dtype=torch.float32)
        self.variances = zeros(slots if self.has_variances else 0, self.dim, dtype=torch.float32)
        on_cpu = int(self.on_cpu)
        self.numbers = zeros(all_strips * on_cpu, depth, 64, dtype=torch.float32)
        self.slots, self.before = zeros(all_strips * 64 * on_cpu), zeros(len(room), max(room) + 1)
        self._each = torch.tensor(each, dtype=torch.int32, device=device)
        self._slot_at = torch.tensor(self.slot_at, dtype=torch.int32, device=device)
        if before is not None:
            self.members = self.members.clone()  # a graph of an earlier step may look at the old numbers
            for level in range(len(room)):
                self._move(level, before)
        self._make_arrays()

    def _move(self, level: int, before: dict[str, Any]) -> None:
        """Copy a level from where it was."""
        length, each = self.levels[level]
        n = before["room"][level]
        shift = self.slot_at[level] - before["slot_at"][level]
        for name, unit, axis in (
            ("place_at", n * length, {"order": 3}),
            ("slot_at", n * each, {"start": 2, "size": 2, "centroids": 2, "variances": 2}),
        ):
            for tensor, along in axis.items():
                old, new = before[tensor], getattr(self, tensor)
                if old.shape[along]:
                    new.narrow(along, getattr(self, name)[level], unit).copy_(
                        old.narrow(along, before[name][level], unit)
                    )
        start = self.start.narrow(2, self.slot_at[level], n * each)
        start += self.place_at[level] - before["place_at"][level]
        self.before[:, :, level, : before["before"].shape[3]] = before["before"][:, :, level]
        if self.on_cpu:
            strips = -(-n * each // 64)
            new_at, old_at = self.strip_at[level], before["strip_at"][level]
            self.numbers[:, :, new_at : new_at + strips] = before["numbers"][:, :, old_at : old_at + strips]
            self.slots[:, :, new_at * 64 : (new_at + strips) * 64] = (
                before["slots"][:, :, old_at * 64 : (old_at + strips) * 64] + shift
            )
        if shift:
            members = self.members[:, :, level]
            self.members[:, :, level] = torch.where(members < 0, members, members + shift)

    def reach(self, keys: int) -> Tensor:
        """``members`` of the first ``keys`` keys, a view."""
        if keys > self.members.shape[3]:
            wider = self.members.new_full((*self.members.shape[:3], max(keys, 2 * self.members.shape[3])), -1)
            wider[..., : self.members.shape[3]] = self.members
            self.members = wider
        return self.members[..., :keys]

    def _mark_members(self, level: int, rows: slice, clusters: Clusters, slot: int) -> None:
        self.reach(int(clusters.order.max()) + 1)
        size = clusters.size.long()
        batch, heads, count = size.shape
        number = torch.arange(slot, slot + count, device=size.device).expand(batch, heads, -1)
        # clusters follow one another in the order of their numbers, and fill it
        owner = number.flatten().repeat_interleave(size.flatten()).view(batch, heads, -1)
        self.members[rows, :, level].scatter_(2, clusters.order.long(), owner.int())

    # -- strips, on a CPU ----------------------------------------------------------------------------------------

    def _make_arrays(self) -> None:
        if not self.on_cpu:
            return
        from ssa_framework.ops.rank_clusters.numba_few import FewScratch, Strips  # Numba takes a moment to import

        def flat(x: Tensor) -> Any:
            return x.flatten(0, 1).numpy()

        base = np.array(self.strip_at, dtype=np.int64)
        self._strips = Strips(flat(self.numbers), flat(self.slots), flat(self.before), base)
        self._start, self._size = flat(self.start), flat(self.size)
        self._scratch_type = FewScratch

    def _fill_strips(self, level: int, first: int, last: int, batches: Sequence[int]) -> None:
        from ssa_framework.ops.rank_clusters.numba_few import fill_strips

        parts, width = 1 + self.has_variances, -(-self.dim // 16) * 16
        centroids = self.centroids.flatten(0, 1).numpy()
        variances = self.variances.flatten(0, 1).numpy() if self.has_variances else centroids
        for pair in (b * self.heads + h for b in batches for h in range(self.heads)):
            fill_strips(
                self._strips, centroids[pair], variances[pair], parts, self._size[pair], pair, level, first, last,
                self.levels[level][1], self.slot_at[level], width,
            )  # fmt: skip

    def _rank_few(
        self, q: Tensor, first: Tensor, stop: Tensor, budget: int, most: int, spread: float
    ) -> OpenedClusters:
        from ssa_framework.ops.numba_runtime import as_array, parallel_for
        from ssa_framework.ops.rank_clusters.numba_few import rank_few

        batch, heads, queries, _ = q.shape
        opened = torch.empty((3, batch, heads, queries, most), dtype=torch.int32)
        out = opened.numpy().reshape(3, batch * heads, queries, most)
        rows = as_array(q.float()).reshape(batch * heads, queries, -1)
        segments = first.numpy(), stop.numpy()
        strips, depth = self._strips, self._strips.numbers.shape[2]
        shares = min(torch.get_num_threads(), batch * heads)
        all_strips = strips.numbers.shape[1]

        def share(task: int) -> None:
            begin, end = (i * batch * heads // shares for i in (task, task + 1))
            scratch = self._scratch_type(
                np.empty(depth, np.float32), np.empty(all_strips * 64, np.float32), np.empty(all_strips, np.float32),
                np.empty(all_strips, np.int64),
            )  # fmt: skip
            rank_few(
                rows, np.float32(spread), -(-self.dim // 16) * 16, strips, self._start, self._size, *segments, budget,
                heads // self.heads, heads, begin, end, scratch, out,
            )  # fmt: skip

        parallel_for(share, shares)
        return OpenedClusters(*opened.unbind())


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin, one after the other, and how long they are together."""
    begins, total = [], 0
    for size in sizes:
        begins.append(total)
        total += size
    return begins, total
