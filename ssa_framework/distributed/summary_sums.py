"""Summaries of keys that lie on several ranks: every rank adds up its own, and sends the sums to those who look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, pack_bits, unpack_bits
from ssa_framework.distributed.needs import covered
from ssa_framework.distributed.rows import RowExchange, fetch_rows
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

    @classmethod
    def of(cls, ranks: Ranks, summaries: Summaries, positions: Tensor, batch: int, kv_heads: int) -> SummarySums:
        """Ask for the sums that some query looks at.

        Args:
            positions: int64 ``[N / W]``, of the keys that this rank holds.
        """
        members = summaries.members.expand(batch, kv_heads, -1, -1)
        count = summaries.count
        sizes = _counts(members, count)
        mine = members[..., positions].contiguous()
        have = (_counts(mine, count) > 0).flatten()
        seen = torch.zeros((1, 1, count), dtype=torch.bool, device=members.device)
        for level in range(summaries.levels):
            first, stop = (x[:, None, :, level, None] for x in (summaries.first, summaries.stop))
            seen = seen | covered(first, stop, count)
        wanted = (seen & (sizes > 0)).flatten()
        # everybody must know who has what, since the keys of a summary may lie on several ranks
        has = [unpack_bits(bits, have.numel()) for bits in ranks.all_gather(pack_bits(have), "requests")]
        asked = [wanted & there for there in has]
        places = [rows.nonzero()[:, 0] for rows in asked]
        exchange = RowExchange.of_requests(ranks, asked, places, wanted.numel(), unique=False)
        return cls(exchange, mine, sizes)

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


def _sums(x: Tensor, members: Tensor, ones: Tensor) -> Tensor:
    sums: Tensor = group_means(x, members, ones)
    return sums


def _counts(members: Tensor, count: int) -> Tensor:
    """int32 ``[B, Hkv, C]``."""
    owner = torch.where(members < 0, count, members).flatten(2).long()
    sizes = torch.zeros((*members.shape[:2], count + 1), dtype=torch.int32, device=members.device)
    return sizes.scatter_add_(2, owner, torch.ones_like(owner, dtype=torch.int32))[..., :count]
