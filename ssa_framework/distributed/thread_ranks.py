"""Ranks that are threads of one process: to test, and to count what would be communicated between more ranks than there
are devices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssa_framework.distributed.collectives import Ranks
from ssa_framework.errors import DistributedError

Result = TypeVar("Result")


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One of several ranks in a process. They exchange tensors by passing them on.

    Attributes:
        traffic: bytes received from other ranks, by purpose.
    """

    mailbox: _Mailbox = field(kw_only=True)
    traffic: Counter[str] = field(default_factory=Counter, kw_only=True)

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        parts = self.mailbox.swap(self.rank, purpose, x.detach())
        self._count(purpose, (self.size - 1) * x.numel() * x.element_size())
        return torch.stack(parts)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str) -> Tensor:
        parts = self.mailbox.swap(self.rank, purpose, x.detach().split(list(send)))
        mine = [part[self.rank] for part in parts]
        if [len(part) for part in mine] != list(receive):
            raise DistributedError(f"rank {self.rank} expected {list(receive)} rows of {purpose}, got others")
        others = sum(part.numel() for rank, part in enumerate(mine) if rank != self.rank)
        self._count(purpose, others * x.element_size())
        return torch.cat(mine)

    def texts(self, text: str, purpose: str) -> list[str]:
        parts: list[str] = self.mailbox.swap(self.rank, purpose, text)
        return parts

    def _count(self, purpose: str, received: int) -> None:
        self.traffic[purpose] += received


class _Mailbox:
    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size

    def swap(self, rank: int, purpose: str, mine: Any) -> list[Any]:
        """What every rank brought."""
        try:
            self._slots[rank] = mine
            self._barrier.wait()
            brought = list(self._slots)
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise DistributedError(
                f"rank {rank} could not exchange {purpose}: another rank stopped with an error of its own"
            ) from error
        return brought

    def abort(self) -> None:
        self._barrier.abort()


def run_ranks(size: int, function: Callable[[ThreadRanks], Result]) -> list[Result]:
    """Run ``function`` on ``size`` ranks that are threads of this process, and return what each returns::

        def attend(ranks):
            context = ContextParallel(ranks, "zigzag")
            parts = [context.shard(x, dim=2) for x in (q, k, v)]
            return context_parallel_attention(*parts, context, is_causal=True), ranks.traffic

        results = run_ranks(4, attend)

    On a CPU only, where a backward call runs in the thread that asks for it. The first error of a rank is raised.
    """
    mailbox = _Mailbox(size)

    def call(rank: int) -> Result:
        try:
            return function(ThreadRanks(None, rank, size, mailbox=mailbox))
        except BaseException:
            mailbox.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        calls = [pool.submit(call, rank) for rank in range(size)]
    errors = [call.exception() for call in calls]
    first = [
        error for error in errors if error is not None and not isinstance(error.__cause__, threading.BrokenBarrierError)
    ]
    if first:
        raise first[0]
    return [call.result() for call in calls]
