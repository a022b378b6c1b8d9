"""Rows of a table that lie on other ranks: who sends which to whom, the exchange, and its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, pack_bits, unpack_bits
from ssa_framework.distributed.needs import true_places


@dataclass(frozen=True)
class RowMasks:
    """Rows of a table of which every rank has a part of R rows.

    Attributes:
        send: bool ``[W, R]``, the rows of this rank's part that each rank wants.
        receive: bool ``[W, R]``, the rows of each rank's part that this rank wants.
    """

    send: Tensor
    receive: Tensor

    @classmethod
    def requested(cls, ranks: Ranks, *wanted: Tensor) -> list[RowMasks]:
        """Of several tables, from what this rank wants of each, bool ``[W, R]``; all ranks are asked at once."""
        bits = pack_bits(torch.cat(wanted, dim=1))
        ones = [1] * ranks.size
        rows = [receive.shape[1] for receive in wanted]
        asked = unpack_bits(ranks.all_to_all(bits, ones, ones, "requests"), sum(rows)).split(rows, dim=1)
        return [cls(send, receive) for send, receive in zip(asked, wanted, strict=True)]

    @cached_property
    def counted(self) -> tuple[Tensor, Tensor]:
        """How many rows are sent and received up to each of them, rank by rank, int32 ``[W · R]`` each."""
        return self.send.flatten().cumsum(0, dtype=torch.int32), self.receive.flatten().cumsum(0, dtype=torch.int32)

    @property
    def ends(self) -> list[Tensor]:
        """How many rows are sent to and received from the ranks up to each, ``[W]`` each; for `RowExchange.of`."""
        return [counted.view(self.send.shape)[:, -1:] for counted in self.counted]


@dataclass(frozen=True)
class RowExchange:
    """Which rows of a distributed table this rank sends and receives.

    Attributes:
        ranks: the process group.
        send: int64 row numbers of the local table, for one rank after the other, ascending for each.
        receive: int64 row numbers of the fetched table, in the same way.
        send_counts, receive_counts: how many of them belong to each rank.
        fetched: rows of the fetched table.
        unique: a row of the fetched table comes from one rank at most.
    """

    ranks: Ranks
    send: Tensor
    receive: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    fetched: int
    unique: bool = True

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        masks: RowMasks,
        ends: list[list[int]],
        fetched: int,
        *,
        sources: Tensor | None = None,
        places: Tensor | None = None,
        unique: bool = True,
    ) -> RowExchange:
        """Of the rows that are true in ``masks``.

        Args:
            ends: the numbers of ``masks.ends``.
            sources: int64 ``[R]``, where each row of this rank's part lies in the local table; where it stands if left
                out. places: int64 ``[W, R]``, where each row of each part belongs in the fetched table; where it
                stands in its part if left out.
        """
        rows = masks.send.shape[1]
        send_counts, receive_counts = (
            [end - before for before, end in pairwise([0, *some])] if rows else [0] * ranks.size for some in ends
        )
        sent, received = masks.counted
        send = true_places(sent, sum(send_counts)).remainder_(max(1, rows))
        receive = true_places(received, sum(receive_counts))
        return cls(
            ranks,
            send if sources is None else sources.index_select(0, send),
            receive.remainder_(max(1, rows)) if places is None else places.flatten().index_select(0, receive),
            send_counts,
            receive_counts,
            fetched,
            unique,
        )

    def fetch(self, local: Tensor, purpose: str) -> Tensor:
        """``local [rows, X]`` of every rank → ``[fetched, X]``; zeros where nothing was wanted. Rows that come from
        several ranks are added in the order of the ranks."""
        moved = self.ranks.all_to_all(local.index_select(0, self.send), self.send_counts, self.receive_counts, purpose)
        if self.unique:
            return moved.new_zeros((self.fetched, local.shape[1])).index_copy_(0, self.receive, moved)
        return _added(moved, self.receive, self.receive_counts, self.fetched)

    def give_back(self, table: Tensor, rows: int, purpose: str) -> Tensor:
        """The transpose of `fetch`: ``table [fetched, X]`` of every rank → ``[rows, X]``: what all ranks have for a
        local row, added in the order of the ranks, in float32 at least."""
        moved = self.ranks.all_to_all(
            table.index_select(0, self.receive), self.receive_counts, self.send_counts, purpose
        )
        return _added(moved, self.send, self.send_counts, rows)


def _added(moved: Tensor, places: Tensor, counts: list[int], rows: int) -> Tensor:
    """Rows ``[sum(counts), X]`` of one rank after the other, added up at ``places``: ``[rows, X]``."""
    wide = moved.to(torch.promote_types(moved.dtype, torch.float32))
    out = wide.new_zeros((rows, moved.shape[1]))
    for place, part in zip(places.split(counts), wide.split(counts), strict=True):
        out.index_add_(0, place, part)  # each row at most once: the order of addition is that of the ranks
    return out.to(moved.dtype)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, purpose: str, known: int, table: Tensor | None, x: Tensor) -> Tensor:
        """``known``: so many leading columns are in ``table`` already, and need not be fetched."""
        ctx.exchange, ctx.purpose, ctx.rows = exchange, purpose, x.shape[0]
        if table is None:
            return exchange.fetch(x, purpose)
        return torch.cat([table, exchange.fetch(x[:, known:].contiguous(), purpose)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = ctx.exchange.give_back(grads[0].contiguous(), ctx.rows, f"gradients of {ctx.purpose}")
        return None, None, None, None, grad


def fetch_rows(exchange: RowExchange, x: Tensor, purpose: str, table: Tensor | None = None) -> Tensor:
    """`RowExchange.fetch` with a gradient.

    Args:
        x: ``[rows, X]``.
        table: ``[fetched, Y]``, the first Y columns of the result where this rank has them already.
    """
    known = 0 if table is None else table.shape[1]
    fetched: Tensor = _Fetch.apply(exchange, purpose, known, table, x)
    return fetched
