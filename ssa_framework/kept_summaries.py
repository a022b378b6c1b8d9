"""`KeptSummaries`: the means of summaries in a cache, made when the first query sees them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.summarize_keys import summarize_keys
from ssa_framework.ops.summary_reach import largest_of_members
from ssa_framework.proposals import Summaries
from ssa_framework.summaries import check_causal

_GROUPS = 64

_Seen = tuple[list[list[int]], list[list[int]]]
"""First and one past the last summary that any query sees of each level, by batch elements."""


class KeptSummaries:
    """Means of keys and of values, by the numbers of summaries, as far as some query has seen them.

    A step costs as much as there are new summaries, and nothing where there are none: those that were seen before are
    neither computed nor checked again.
    """

    def __init__(self) -> None:
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self._made: Tensor | None = None  # bool [B, C]
        self._since: Tensor | None = None  # int32 [B, C], the position of a query that has seen it, an early one
        self._columns: Tensor | None = None
        self._seen: _Seen | None = None

    def crop(self, length: int) -> None:
        """Forget the summaries that no query before position ``length`` has seen: others may take their place."""
        if self._made is not None and self._since is not None:
            self._made &= self._since < length
            self._seen = None

    def reorder(self, index: Tensor) -> None:
        """Replace the batch elements by those at ``index``."""
        if self._tables is None or self._made is None or self._since is None:
            return
        k, v, log_weight = (x.index_select(0, index) for x in self._tables)
        self._tables = k, v, log_weight
        self._made, self._since = self._made.index_select(0, index), self._since.index_select(0, index)
        self._seen = None

    def complete(
        self, summaries: Summaries, source: str, mask: EdgeMask, columns: Tensor | None, k: Tensor, v: Tensor
    ) -> Summaries:
        """``summaries`` with what `Summaries.made` holds: without padding, and without ``columns``.

        Args:
            k: ``[B, Hkv, M, D]``. v: ``[B, Hkv, M, Dv]``, all that is cached.

        Raises:
            ConfigError, ProposalError: see `clean_summaries`.
        """
        if mask.has_explicit:
            raise ConfigError(f"source {source!r} summarises keys, which no attn_mask or mask_mod may hide one by one")
        if not summaries.count:
            return summaries
        if self._is_stale(summaries, columns):
            self._allocate(summaries.count, columns, k, v)
        # what any query sees of each level
        seen: _Seen
        if summaries.seen is not None:
            seen = [list(summaries.seen[0])], [list(summaries.seen[1])]
        elif summaries.first.shape[1] == 1:
            seen = summaries.first[:, 0].tolist(), summaries.stop[:, 0].tolist()
        else:
            seen = summaries.first.amin(1).tolist(), summaries.stop.amax(1).tolist()
        if seen != self._seen:
            self._make(summaries, seen, source, mask, k, v)
            self._seen = seen
        return replace(summaries, made=self._tables)

    def _is_stale(self, summaries: Summaries, columns: Tensor | None) -> bool:
        if self._tables is None or self._tables[0].shape[2] != summaries.count:
            return True
        if columns is None or self._columns is None:
            return columns is not self._columns
        return columns is not self._columns and not torch.equal(columns, self._columns)

    def _allocate(self, count: int, columns: Tensor | None, k: Tensor, v: Tensor) -> None:
        compute = torch.float64 if k.dtype == torch.float64 else torch.float32
        lead = (*k.shape[:2], count)
        self._tables = (
            torch.zeros((*lead, k.shape[3]), dtype=compute, device=k.device),
            torch.zeros((*lead, v.shape[3]), dtype=compute, device=k.device),
            torch.full(lead, float("-inf"), dtype=compute, device=k.device),
        )
        self._made = torch.zeros((k.shape[0], count), dtype=torch.bool, device=k.device)
        self._since = torch.zeros((k.shape[0], count), dtype=torch.int32, device=k.device)
        self._columns, self._seen = columns, None

    def _make(
        self,
        summaries: Summaries,
        seen: _Seen,
        source: str,
        mask: EdgeMask,
        k: Tensor,
        v: Tensor,
    ) -> None:
        """The summaries that queries see, of those that are not there yet."""
        assert self._tables is not None
        assert self._made is not None
        assert self._since is not None
        batch, count = self._made.shape
        wanted = torch.zeros((batch, count + 1), dtype=torch.bool, device=k.device)  # the last one: none
        for element in range(batch):
            row = element if len(seen[0]) > 1 else 0
            for first, stop in zip(seen[0][row], seen[1][row], strict=True):
                wanted[element, first:stop] = True
        wanted[:, :count] &= ~self._made
        numbers = wanted.any(0).nonzero()[:, 0]
        if not numbers.numel():
            return
        place = torch.full((count + 1,), -1, dtype=torch.int32, device=k.device)
        place[numbers] = torch.arange(numbers.numel(), dtype=torch.int32, device=k.device)
        members = summaries.members
        about = (members >= numbers[0].int()) & (members <= numbers[-1].int())
        keys = about.flatten(0, 2).any(0).nonzero()[:, 0]
        members = members[..., keys]
        members = place[torch.where(members < 0, count, members).long()]
        last = self._last_keys(members, keys, numbers.numel())
        if mask.key_keep is not None:
            members = torch.where(mask.key_keep[:, None, None, keys], members, -1)
        if self._columns is not None:
            members = members.masked_fill(torch.isin(keys, self._columns), -1)
        fresh = summarize_keys(k[:, :, keys], v[:, :, keys], members, numbers.numel())
        here = wanted[:, numbers]
        for kept, made in zip(self._tables, fresh, strict=True):
            new = here.view(batch, 1, -1, *[1] * (kept.dim() - 3))
            kept[:, :, numbers] = torch.where(new, made, kept[:, :, numbers])
        self._made |= wanted[:, :count]
        self._since = torch.where(wanted[:, :count], _first_seen(summaries, mask.positions, batch), self._since)
        lasts = torch.full((last.shape[0], count), -1, dtype=torch.int32, device=k.device)
        lasts[:, numbers] = last
        for level in range(summaries.levels):
            check_causal(lasts, summaries, level, source, mask)

    @staticmethod
    def _last_keys(members: Tensor, keys: Tensor, count: int) -> Tensor:
        """The position of the last key of each, int32 ``[B or 1, count]``; ``members [B or 1, Hkv or 1, R, keys]``."""
        levels = [largest_of_members(level, count, keys.int()[None]) for level in members.unbind(2)]
        return torch.stack(levels).amax(0)


def _first_seen(summaries: Summaries, positions: Tensor, batch: int) -> Tensor:
    """The position of an early query that sees each summary, int32 ``[B, C]``: the first one, or, of many queries, one
    of the first group of them that sees it."""
    found = torch.zeros((batch, summaries.count), dtype=torch.int32, device=positions.device)
    queries = positions.shape[1]
    step = -(-queries // _GROUPS)
    for begin in reversed(range(0, queries, step)):
        rows = slice(begin, min(begin + step, queries))
        firsts, stops = summaries.first[:, rows].amin(1).tolist(), summaries.stop[:, rows].amax(1).tolist()
        ends = positions[:, rows].amax(1).tolist()
        for element in range(batch):
            row, end = element if len(firsts) > 1 else 0, ends[element if len(ends) > 1 else 0]
            for first, stop in zip(firsts[row], stops[row], strict=True):
                found[element, first:stop] = end
    return found
