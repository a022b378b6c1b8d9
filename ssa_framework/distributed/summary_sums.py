"""Summaries of keys that lie on several ranks: every rank adds up its own, and sends the sums to those who look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks
from ssa_framework.distributed.layout import SequenceLayout
from ssa_framework.distributed.needs import covered
from ssa_framework.distributed.rows import RowExchange, RowMasks, fetch_rows
from ssa_framework.ops.summarize_keys.api import group_means
from ssa_framework.proposals import Summaries


@dataclass(frozen=True)
class SummarySums:
    """How the means of keys and values of a graph's summaries are made.

    Attributes:
        exchange: sums of the keys of each rank, ``[B · Hkv · C]`` rows.
        members: int32 ``[B, Hkv, R, N / W]``, of the keys that this rank holds.
        sizes: int32 ``[B, Hkv, C]``, of all keys.
    """

    exchange: RowExchange
    members: Tensor
    sizes: Tensor

    def means(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``k, v [B, Hkv, N / W, ..]`` of this rank → means of keys and of values ``[B, Hkv, C, ..]`` and logarithms
        of sizes ``[B, Hkv, C]``; zeros where no query of this rank looks."""
        wide = torch.promote_types(k.dtype, torch.float32)
        ones = torch.ones_like(self.sizes)  # a mean over one is a sum
        sums = torch.cat([_sums(k, self.members, ones), _sums(v, self.members, ones)], dim=-1)
        rows = fetch_rows(self.exchange, sums.flatten(0, 2), "sums of summaries")
        means = rows.view(sums.shape) / self.sizes.clamp(min=1)[..., None]
        mean_k, mean_v = means.split([k.shape[3], v.shape[3]], dim=-1)
        return mean_k.contiguous(), mean_v.contiguous(), self.sizes.to(wide).log()


@dataclass(frozen=True)
class SharedMembers:
    """Keys of a graph's summaries, rank by rank. All ranks know them, so they need not be asked who has what.

    Attributes:
        members: int32 ``[B, Hkv, R, N / W]``, of the keys that this rank holds.
        counts: int32 ``[W, B, Hkv, C]``, how many keys of each summary each rank holds.
        wanted: bool ``[W, B · Hkv · C]``, the sums of each rank that some query of this one looks at.
    """

    members: Tensor
    counts: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, rank: int, summaries: Summaries, layout: SequenceLayout, batch: int, kv_heads: int) -> SharedMembers:
        members = layout.by_rank(summaries.members.expand(batch, kv_heads, -1, -1))  # [W, B, Hkv, R, N / W]
        owner = torch.where(members < 0, summaries.count, members).flatten(3).long()
        counts = torch.zeros((*owner.shape[:3], summaries.count + 1), dtype=torch.int32, device=members.device)
        counts = counts.scatter_(3, owner, 1, reduce="add")[..., :-1]
        seen = covered(summaries.first[:, None], summaries.stop[:, None], summaries.count)
        return cls(members[rank].contiguous(), counts, ((counts > 0) & seen).flatten(1))

    def sums(self, ranks: Ranks, masks: RowMasks, ends: list[list[int]]) -> SummarySums:
        """What follows from the rows that are exchanged; arguments as in `RowExchange.of`."""
        exchange = RowExchange.of(ranks, masks, ends, self.wanted.shape[1], unique=False)
        return SummarySums(exchange, self.members, self.counts.sum(0, dtype=torch.int32))


def _sums(x: Tensor, members: Tensor, ones: Tensor) -> Tensor:
    sums: Tensor = group_means(x, members, ones)
    return sums
