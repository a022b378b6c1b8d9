"""What a neighbor source may return: `Band`, `Columns`, `Candidates` or `Ranges`.

Shapes: B batch, G graph heads, N queries, M keys. Key indices are int32 and ``-1`` means an empty slot. A leading
size of 1 broadcasts, so a proposal that is the same for every batch element, head or query is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ssa_framework.errors import ProposalError


@dataclass(frozen=True)
class Band:
    """Query at position ``p`` attends the keys ``[p - before, p + after]``; clipped to the sequence by the router."""

    before: int
    after: int

    def __post_init__(self) -> None:
        for name, value in (("before", self.before), ("after", self.after)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProposalError(f"Band.{name} must be an integer >= 0, got {value!r}")

    @property
    def width(self) -> int:
        return self.before + self.after + 1


@dataclass(frozen=True)
class Columns:
    """Key positions that every query attends, in any order, duplicates allowed.

    ``positions``: integers, or an integer tensor ``[C]``. A router on a GPU has to wait for the device to read a
    tensor; integers cost nothing.
    """

    positions: Sequence[int] | Tensor


@dataclass(frozen=True)
class Candidates:
    """Keys proposed one by one.

    Attributes:
        indices: int32 ``[B or 1, G or 1, N or 1, C]``, ``-1`` = empty, any order, duplicates allowed.
        scores: exact unscaled ``q·k`` of the candidates, same shape as ``indices`` and floating point, where the
            source has them anyway; left out, the router computes them.
        guaranteed: the candidates are a fixed pattern (explicit edges, random links): they are kept before anything
            that competes by score, and the router raises `BudgetError` where they do not fit.
        keys_scored: how many query-key pairs the source compared to find the candidates, summed over queries, heads
            and batch, where that is more than what it proposes (a search index knows; the router adds nothing).
    """

    indices: Tensor
    scores: Tensor | None = None
    guaranteed: bool = False
    keys_scored: int | None = None


@dataclass(frozen=True)
class Ranges:
    """Slices of sorted key orders: hash buckets, clusters, blocks.

    Attributes:
        order: int32 ``[B or 1, G or 1, S, L]``: S orders of the keys (L = M for a permutation; an order may leave
            keys out). Within a slice keys come in increasing position. ``None`` is the identity order (S = 1).
        start, end: int32 ``[B or 1, G or 1, N or 1, S, P]``: for each query, P slices ``[start, end)`` of each
            order; ``start == end`` is an empty slice. ``None`` for both is one slice that holds everything.
        attend: ``"topk"``: the router keeps the keys with the highest exact ``q·k`` of all slices. ``"all"``: every
            key of every slice is a neighbor, beside the budget.
        limit: at most this many keys of each slice; the router takes the ones nearest to the query in position
            (causal: its latest members before the query), so that early and late queries both fill their budget.
    """

    order: Tensor | None
    start: Tensor | None
    end: Tensor | None
    attend: Literal["topk", "all"] = "topk"
    limit: int | None = None

    @classmethod
    def everything(cls) -> Ranges:
        """One slice that holds every key: exact search."""
        return cls(order=None, start=None, end=None)

    @property
    def is_everything(self) -> bool:
        return self.order is None and self.start is None and self.limit is None


Proposal: TypeAlias = Band | Columns | Candidates | Ranges


def _check_integer(tensor: object, what: str, source: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ProposalError(f"source {source!r}: {what} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ProposalError(f"source {source!r}: {what} must be int32 (int64 is converted), got {tensor.dtype}")
    return tensor


def _check_shape(tensor: Tensor, sizes: tuple[tuple[str, int | None], ...], what: str, source: str) -> None:
    """Every dimension is its size or 1; ``None`` is free."""
    fits = tensor.dim() == len(sizes) and all(
        size is None or actual in (1, size) for actual, (_, size) in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        want = ", ".join(name if size is None else f"{name}={size} or 1" for name, size in sizes)
        raise ProposalError(f"source {source!r}: {what} must have shape [{want}], got {list(tensor.shape)}")


def _require(holds: Tensor, message: Callable[[], str]) -> None:
    """Raise `ProposalError` unless ``holds`` (0-dim bool). On CUDA the device checks it when it gets there, since
    asking for the answer would make the host wait: a broken proposal then stops the program a little later."""
    if holds.device.type == "cuda":
        torch._assert_async(holds, "a neighbor source returned an invalid proposal; run it on the CPU to see which")
    elif not bool(holds):
        raise ProposalError(message())


def _check_bounds(tensor: Tensor, low: int, high: int, what: str, source: str) -> None:
    if tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)
    _require(
        (smallest >= low) & (largest <= high),
        lambda: (
            f"source {source!r}: {what} must lie in [{low}, {high}], got values in [{int(smallest)}, {int(largest)}]"
        ),
    )


def _check_device(tensor: Tensor, device: torch.device, what: str, source: str) -> None:
    if tensor.device != device:
        raise ProposalError(f"source {source!r}: {what} is on {tensor.device}, the keys are on {device}")


def validate_proposal(
    proposal: object, source: str, *, batch: int, graph_heads: int, queries: int, keys: int, device: torch.device
) -> Proposal:
    """Return ``proposal`` with int32 indices, or raise `ProposalError` that says what was expected and what came."""
    if isinstance(proposal, Band):
        return proposal
    if isinstance(proposal, Columns):
        return _validate_columns(proposal, source, keys=keys, device=device)
    lead = (("B", batch), ("G", graph_heads))
    if isinstance(proposal, Candidates):
        indices = _check_integer(proposal.indices, "Candidates.indices", source)
        _check_shape(indices, (*lead, ("N", queries), ("C", None)), "Candidates.indices", source)
        _check_device(indices, device, "Candidates.indices", source)
        _check_bounds(indices, -1, keys - 1, "Candidates.indices", source)
        scores = proposal.scores
        if scores is not None and (scores.shape != indices.shape or not scores.is_floating_point()):
            raise ProposalError(
                f"source {source!r}: Candidates.scores must be floating point of shape {list(indices.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        return Candidates(indices.to(torch.int32), scores, proposal.guaranteed, proposal.keys_scored)
    if isinstance(proposal, Ranges):
        return _validate_ranges(proposal, source, lead=lead, queries=queries, keys=keys, device=device)
    raise ProposalError(
        f"source {source!r}: propose() must return Band, Columns, Candidates or Ranges, got {type(proposal).__name__}"
    )


def _validate_columns(columns: Columns, source: str, *, keys: int, device: torch.device) -> Columns:
    positions = columns.positions
    if isinstance(positions, Tensor):
        _check_integer(positions, "Columns.positions", source)
        if positions.dim() != 1:
            raise ProposalError(
                f"source {source!r}: Columns.positions must have shape [C], got {list(positions.shape)}"
            )
        _check_device(positions, device, "Columns.positions", source)
        _check_bounds(positions, 0, keys - 1, "Columns.positions", source)
        return Columns(positions.to(torch.int32))
    wrong = [p for p in positions if isinstance(p, bool) or not isinstance(p, int) or not 0 <= p < keys]
    if wrong:
        raise ProposalError(
            f"source {source!r}: Columns.positions must be integers in [0, {keys - 1}], got {wrong[0]!r}"
        )
    return Columns(tuple(positions))


@functools.lru_cache(maxsize=256)
def _on_device(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32, device=device)


def unite_columns(proposed: Sequence[Columns], device: torch.device) -> Tensor | None:
    """The positions of validated columns, int32 ``[C]``, ascending, each once; ``None`` where there are none.

    The tensor may be shared by many calls, so nobody may write to it.
    """
    if not proposed:
        return None
    given = [c.positions for c in proposed]
    if all(isinstance(p, tuple) for p in given):
        return _on_device(tuple(sorted({place for positions in given for place in positions})), device)
    tensors = [torch.as_tensor(p, dtype=torch.int32, device=device) for p in given]
    return torch.cat(tensors).unique()


def _validate_ranges(
    ranges: Ranges,
    source: str,
    *,
    lead: tuple[tuple[str, int], tuple[str, int]],
    queries: int,
    keys: int,
    device: torch.device,
) -> Ranges:
    if ranges.attend not in ("topk", "all"):
        raise ProposalError(f"source {source!r}: Ranges.attend must be 'topk' or 'all', got {ranges.attend!r}")
    if ranges.limit is not None and ranges.limit < 1:
        raise ProposalError(f"source {source!r}: Ranges.limit must be >= 1 or None, got {ranges.limit}")
    if (ranges.start is None) != (ranges.end is None):
        raise ProposalError(f"source {source!r}: Ranges.start and Ranges.end must both be given, or both be None")
    order, orders, length = ranges.order, 1, keys
    if order is not None:
        order = _check_integer(order, "Ranges.order", source)
        _check_shape(order, (*lead, ("S", None), ("L", None)), "Ranges.order", source)
        _check_device(order, device, "Ranges.order", source)
        _check_bounds(order, 0, keys - 1, "Ranges.order", source)
        order = order.to(torch.int32)
        orders, length = order.shape[2], order.shape[3]
    if ranges.start is None or ranges.end is None:
        return Ranges(order, None, None, ranges.attend, ranges.limit)
    start = _check_integer(ranges.start, "Ranges.start", source)
    end = _check_integer(ranges.end, "Ranges.end", source)
    for name, tensor in (("start", start), ("end", end)):
        what = f"Ranges.{name}"
        _check_shape(tensor, (*lead, ("N", queries), ("S", None), ("P", None)), what, source)
        if tensor.shape[3] != orders:
            raise ProposalError(
                f"source {source!r}: {what} has {tensor.shape[3]} orders in dimension 3, Ranges.order has {orders}"
            )
        _check_device(tensor, device, what, source)
        _check_bounds(tensor, 0, length, what, source)
    if start.shape != end.shape:
        raise ProposalError(
            f"source {source!r}: Ranges.start {list(start.shape)} and Ranges.end {list(end.shape)} differ in shape"
        )
    _require((start <= end).all(), lambda: f"source {source!r}: Ranges.start must not exceed Ranges.end")
    return Ranges(order, start.to(torch.int32), end.to(torch.int32), ranges.attend, ranges.limit)
