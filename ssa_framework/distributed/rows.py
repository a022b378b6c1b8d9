"""Rows of a table that lie on other ranks: who sends which to whom, the exchange, and its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks, pack_bits, unpack_bits


@dataclass(frozen=True)
class RowExchange:
    """Which rows of a distributed table this rank sends and receives.

    Attributes:
        ranks: the process group.
        send: int64 row numbers of the local table, ascending, for every rank.
        receive: int64 row numbers of the fetched table, ascending, from every rank.
        fetched: rows of the fetched table.
        unique: a row of the fetched table comes from one rank at most.
    """

    ranks: Ranks
    send: tuple[Tensor, ...]
    receive: tuple[Tensor, ...]
    fetched: int
    unique: bool = True

    @classmethod
    def of_requests(
        cls, ranks: Ranks, wanted: list[Tensor], places: list[Tensor], fetched: int, unique: bool = True
    ) -> RowExchange:
        """Ask every rank for rows of its table.

        Args:
            wanted: for every rank, bool ``[rows of its table]``, equally many on all ranks: the rows that this rank
                wants. places: for every rank, int64 ``[rows wanted]``, where they belong in the fetched table.
        """
        bits = torch.stack([pack_bits(rows) for rows in wanted])
        ones = [1] * ranks.size
        asked = ranks.all_to_all(bits, ones, ones, "requests")
        count = wanted[ranks.rank].numel()
        send = tuple(unpack_bits(row, count).nonzero()[:, 0] for row in asked)
        return cls(ranks, send, tuple(places), fetched, unique)

    def fetch(self, local: Tensor, purpose: str) -> Tensor:
        """``local [rows, X]`` of every rank → ``[fetched, X]``; zeros where nothing was wanted. Rows that come from
        several ranks are added in the order of the ranks."""
        return self._move(local, self.send, self.receive, self.fetched, purpose, add=not self.unique)

    def give_back(self, table: Tensor, rows: int, purpose: str) -> Tensor:
        """The transpose of `fetch`: ``table [fetched, X]`` of every rank → ``[rows, X]``: what all ranks have for a
        local row, added in the order of the ranks, in float32 at least."""
        return self._move(table, self.receive, self.send, rows, purpose, add=True)

    def _move(
        self, x: Tensor, send: tuple[Tensor, ...], receive: tuple[Tensor, ...], rows: int, purpose: str, add: bool
    ) -> Tensor:
        counts = [place.numel() for place in receive]
        moved = self.ranks.all_to_all(
            x.index_select(0, torch.cat(send)), [place.numel() for place in send], counts, purpose
        )
        if not add:
            return x.new_zeros((rows, x.shape[1])).index_copy_(0, torch.cat(receive), moved)
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        out = torch.zeros((rows, x.shape[1]), dtype=wide, device=x.device)
        for place, part in zip(receive, moved.split(counts), strict=True):
            out.index_add_(0, place, part.to(wide))  # each row at most once: the order of addition is that of the ranks
        return out.to(x.dtype)


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
