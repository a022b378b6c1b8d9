"""Which keys routing may read on each rank, and those keys, from all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, on_host
from ssa_framework.distributed.layout import SequenceLayout
from ssa_framework.distributed.rows import RowExchange, RowMasks
from ssa_framework.masks import EdgeMask


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
        return self._within(rank, slice(None), torch.arange(self.layout.length, device=self.device))

    def keys_of(self, rank: int) -> Tensor:
        """Which of the keys that ``rank`` holds are within reach of some query of each rank, bool
        ``[W, B or 1, N / W]``."""
        here = self.layout.positions_by_rank(self.device)[rank]
        return self._within(slice(None), here, here)

    def _within(self, rank: int | slice, keys: Tensor | slice, positions: Tensor) -> Tensor:
        lasts = self._lasts[rank]
        if self._documents is not None:
            number = self._documents[0][:, keys]
            lasts = lasts.gather(-1, number.expand(*lasts.shape[:-1], -1))
        within = positions <= lasts
        return within if self.key_keep is None else within & self.key_keep[:, keys]

    @cached_property
    def _lasts(self) -> Tensor:
        """The last position that the queries of each rank may attend in each document, int64
        ``[W, B or 1, documents]``."""
        queries = self.layout.positions_by_rank(self.device)
        if not self.causal:
            queries = torch.full_like(queries, self.layout.length)
        if self._documents is None:
            return queries[:, None, -1:]
        number, count = self._documents
        number = self.layout.by_rank(number)  # [W, B or 1, N / W]
        lasts = torch.full((*number.shape[:2], count), -1, dtype=torch.int64, device=self.device)
        return lasts.scatter_reduce_(2, number, queries[:, None].expand_as(number), "amax")

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
    batch, heads, _, dim = k.shape
    layout = reach.layout
    if everything:
        return layout.in_order(torch.cat(list(ranks.all_gather(k, "keys for routing")), dim=2), 2)
    both = (reach.keys_of(ranks.rank), layout.by_rank(reach.keys(ranks.rank)))
    masks = RowMasks(*(rows[:, :, None].expand(-1, batch, heads, -1).flatten(1) for rows in both))
    head = torch.arange(batch * heads, device=k.device).view(batch, heads, 1) * layout.length
    places = layout.positions_by_rank(k.device)[:, None, None] + head
    rows = batch * heads * layout.length
    exchange = RowExchange.of(ranks, masks, on_host(masks.ends), rows, places=places)
    return exchange.fetch(k.flatten(0, 2), "keys for routing").view(batch, heads, layout.length, dim)
