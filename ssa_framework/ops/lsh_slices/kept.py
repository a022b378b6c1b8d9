"""`KeptHashes`: codes of keys that are kept while their sequence grows, so that a step hashes what is new."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssa_framework.growing import GrowingTensor
from ssa_framework.ops.lsh_slices.api import check_finite
from ssa_framework.ops.lsh_slices.types import Family


@dataclass
class Buckets:
    """The order by bucket of the first keys.

    Attributes:
        bits: of the bucket numbers, for every batch element; 0 = none was made.
        covered: how many keys. order: int32 ``[B, Hkv, S, covered]``. firsts: int32 ``[B, Hkv, S, buckets + 1]``.
    """

    bits: tuple[int, ...]
    covered: int
    order: Tensor
    firsts: Tensor


class KeptHashes:
    """Codes of the keys of a cache, under S hash functions, and the order by bucket of all but the latest keys.

    A query looks into its buckets in that order, and at the codes of the latest keys one by one. The order is made
    anew when those have become a share of all keys, or when the number of bits changes. Codes of hyperplanes hold
    those of fewer bits; polytopes hash the keys of a batch element again when its number of bits changes, which
    is when it has become twice as long.

    Causal means are those of `lsh_slices`, bit for bit on a CPU: sums go on in float64, from key to key.

    Args:
        family, center: as in `lsh_slices`. max_bits: the most bits of any query, at most 16.
        batch, heads, functions, dim: B, Hkv, S, D.
        device: where everything lies. backend: ``"numba"`` (CPU), ``"torch"``, or ``"auto"``.
    """

    few = 16
    """Queries that get lists of their own, where none of them is in the order; for more, all keys are ordered."""
    shortest_tail, tail_share = 1024, 16
    """Latest keys that are not in the order: this many, or a share of all keys, if that is more."""
    margin = 64
    """Keys that stay out of a new order, since the next `crop` may drop them."""
    save_every = 256
    """Keys from one saved sum to the next."""

    def __init__(
        self,
        family: Family,
        max_bits: int,
        *,
        batch: int,
        heads: int,
        functions: int,
        dim: int,
        center: bool,
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        self.family, self.max_bits, self.center = family, max_bits, center
        self.heads, self.functions = heads, functions
        self.on_numba = backend == "numba" or (backend == "auto" and device.type == "cpu")
        self.stored = [max_bits if family == "hyperplane" else 0] * batch
        """Bits of the codes of every batch element."""
        self.strips: dict[int, Any] = {}
        """Directions as a kernel wants them, by number of bits."""
        self._mark: tuple[int, int] | None = None  # of the directions that everything was hashed with
        self.sums = torch.zeros((batch, heads, dim), dtype=torch.float64, device=device)
        self.counts = torch.zeros((batch, heads), dtype=torch.int64, device=device)
        self._summed = 0  # keys that are in the sums
        self._codes = GrowingTensor(axis=3)
        self._saved_sums, self._saved_counts = GrowingTensor(axis=2), GrowingTensor(axis=2)
        self._buckets: Buckets | None = None

    # -- keys come and go ----------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self._codes.length

    def append(self, k: Tensor, directions: Tensor, bits: Sequence[int], keep: Tensor | None = None) -> None:
        """Hash the keys that are new.

        Args:
            k: ``[B, Hkv, M, D]``, all keys. directions: float32 ``[S, F, D]``.
            bits: at which the next queries of each batch element look; below 1: at none.
            keep: bool ``[B or 1, M]``, False = padding, in which ``k`` is zero.
        """
        batch, _, length, dim = k.shape
        first_new, new = self.length, length - self.length
        self._codes.append(torch.zeros((batch, self.heads, self.functions, new), dtype=torch.int16, device=k.device))
        if self.center:
            saves = -(-length // self.save_every) - self._saved_sums.length
            if saves > 0 or self._saved_sums.room is None:
                self._saved_sums.append(self.sums.new_zeros((batch, self.heads, saves, dim)))
                self._saved_counts.append(self.counts.new_zeros((batch, self.heads, saves)))
        again = self._hashed_again(directions, bits)
        if again and self.center:
            self.sums[again], self.counts[again] = 0.0, 0
        tasks: dict[tuple[int, int, int], list[int]] = {}
        for b in range(batch):
            begin, first = self._summed if self.center else first_new, first_new
            if b in again:
                begin = first = 0
                if self.family == "cross_polytope":
                    self.stored[b] = max(bits[b], 0)
            tasks.setdefault((begin, first, self.stored[b]), []).append(b)
        for (begin, first, stored), elements in tasks.items():
            self._implementation.hash_new(self, k, keep, directions, elements, begin, first, stored)
        self._summed = length

    def _hashed_again(self, directions: Tensor, bits: Sequence[int]) -> list[int]:
        """The batch elements all of whose keys have to be hashed: by other directions, or by another number of bits."""
        mark = directions.data_ptr(), 0 if directions.is_inference() else directions._version
        if mark != self._mark:
            check_finite(directions)
            self._mark, self._buckets = mark, None
            self.strips.clear()
            return list(range(len(bits)))
        if self.family == "hyperplane":
            return []
        return [b for b, number in enumerate(bits) if self.stored[b] != max(number, 0)]

    def crop(self, length: int) -> None:
        """Drop the keys from position ``length`` on."""
        self._codes.crop(length)
        if self._buckets is not None and self._buckets.covered > length:
            self._buckets = None
        if self.center and self._summed > length:
            save = length // self.save_every
            self.sums.copy_(self._saved_sums.view[:, :, save])
            self.counts.copy_(self._saved_counts.view[:, :, save])
            self._summed = save * self.save_every

    def reorder(self, index: Tensor) -> None:
        """Replace the batch elements by those at ``index``."""
        self.stored = [self.stored[b] for b in index.tolist()]
        self.sums, self.counts = self.sums.index_select(0, index), self.counts.index_select(0, index)
        for growing in (self._codes, self._saved_sums, self._saved_counts):
            growing.reorder(index)
        if self._buckets is not None:
            bits = tuple(self._buckets.bits[b] for b in index.tolist())
            order, firsts = (x.index_select(0, index) for x in (self._buckets.order, self._buckets.firsts))
            self._buckets = Buckets(bits, self._buckets.covered, order, firsts)

    # -- queries -------------------------------------------------------------------------------------------------

    def slices(
        self,
        q: Tensor,
        directions: Tensor,
        bits: Sequence[int],
        *,
        probes: int,
        limit: int,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The latest members, up to each query, of the buckets that it looks into.

        Args:
            q: ``[B, G, N, D]``, the queries of the last keys. directions: float32 ``[S, F, D]``.
            bits: at which all queries of a batch element look; below 1: at nothing.
            probes, limit: further buckets of a query, and the latest members that it looks at, of each.
            keep: as in `append`.

        Returns:
            ``order`` int32 ``[B, G or Hkv, S, L]``, ``start`` and ``end``, int32 ``[B, G, N, S, 1 + probes]``, as
            `lsh_slices`. Slices may hold more than ``limit`` keys, and keys after the query.
        """
        batch, heads, queries, _ = q.shape
        bits = tuple(max(b, 0) for b in bits)
        limit = min(limit, self.length)
        start = torch.zeros((batch, heads, queries, self.functions, 1 + probes), dtype=torch.int32, device=q.device)
        end, few = torch.zeros_like(start), queries <= self.few
        buckets = self._bucketed(bits, few, keep)
        lists: Tensor | None = None
        if few:
            shape = (batch, heads, self.functions, queries * (1 + probes) * limit)
            lists = torch.zeros(shape, dtype=torch.int32, device=q.device)
        for level, elements in _groups(bits):
            self._implementation.look_up(
                self, q, keep, directions, elements, level, self.stored[elements[0]], self.length - queries, limit,
                buckets, lists, start, end,
            )  # fmt: skip
        if lists is not None:
            return lists, start, end
        assert buckets is not None
        return buckets.order, start, end

    def _bucketed(self, bits: tuple[int, ...], few: bool, keep: Tensor | None) -> Buckets | None:
        """The order that queries with so many bits look into: for few queries, of all but the latest keys."""
        kept = self._buckets if self._buckets is not None and self._buckets.bits == bits else None
        covered = 0 if kept is None else kept.covered
        if few:
            if self.length - covered <= max(self.shortest_tail, self.length // self.tail_share):
                return kept
            covered = self.length - self.margin
        elif covered == self.length:
            return kept
        else:
            covered = self.length
        shape, device = (len(bits), self.heads, self.functions), self.sums.device
        order = torch.zeros((*shape, covered), dtype=torch.int32, device=device)
        firsts = torch.zeros((*shape, 2 ** max(bits) + 1), dtype=torch.int32, device=device)
        for level, elements in _groups(bits):
            self._implementation.order_codes(
                self, keep, elements, level, self.stored[elements[0]], covered, order, firsts
            )
        self._buckets = Buckets(bits, covered, order, firsts)
        return self._buckets

    # -- for the implementations ---------------------------------------------------------------------------------

    @property
    def _implementation(self) -> ModuleType:
        if self.on_numba:
            from ssa_framework.ops.lsh_slices import numba_kept  # Numba takes a moment to import

            return numba_kept
        from ssa_framework.ops.lsh_slices import torch_kept

        return torch_kept

    def codes_room(self) -> Tensor:
        """The bits of the codes as int16 ``[B, Hkv, S, room]``; whatever stands behind ``length`` is none."""
        assert self._codes.room is not None
        return self._codes.room

    def saved_rooms(self) -> tuple[Tensor, Tensor]:
        """Sums and counts of the keys before every ``save_every``-th one, ``[B, Hkv, room, D]`` and
        ``[B, Hkv, room]``; nothing where keys are not centred."""
        if self._saved_sums.room is None or self._saved_counts.room is None:
            return self.sums[:, :, None], self.counts[:, :, None]
        return self._saved_sums.room, self._saved_counts.room


def _groups(bits: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Batch elements that have the same number of bits, 1 or more."""
    elements = sorted((b for b in range(len(bits)) if bits[b] > 0), key=lambda b: bits[b])
    for level, some in itertools.groupby(elements, key=lambda b: bits[b]):
        yield level, list(some)
