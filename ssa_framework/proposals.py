"""What a neighbor source may return: `Band`, `Columns`, `Spans`, `Candidates`, `Ranges` or `Summaries`.

Shapes: B batch, G graph heads, N queries, M keys. Key indices are int32 and ``-1`` means an empty slot. A leading
size of 1 broadcasts, so a proposal that is the same for every batch element, head or query is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

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

    Attributes:
        positions: integers, or an integer tensor ``[C]``. A router on a GPU has to wait for the device to read a
            tensor; integers cost nothing.
        slots: how many slots of the budget they take, where that is more than they are: a source that waits for
            positions to be reached counts them from the beginning, so that the other neighbors of a query do not
            depend on what comes later.
    """

    positions: Sequence[int] | Tensor
    slots: int = 0


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
        order: int32 ``[B or 1, G or Hkv or 1, S, L]``: S orders of the keys (L = M for a permutation; an order may
            leave keys out). Within a slice keys come in increasing position. ``None`` is the identity order (S = 1).
        start, end: int32 ``[B or 1, G or 1, N or 1, S, P]``: for each query, P slices ``[start, end)`` of each
            order; ``start == end`` is an empty slice. ``None`` for both is one slice that holds everything.
        attend: ``"topk"``: the router keeps the keys with the highest exact ``q·k`` of all slices. ``"all"``: every
            key of every slice is a neighbor, beside the budget; the slices of one order must not overlap then.
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


@dataclass(frozen=True)
class Spans:
    """Each query attends the keys of one interval of positions, beside the budget: its own segment, for example.

    Attributes:
        start, end: int32 ``[B or 1, N]``: the keys from ``start`` to ``end - 1``; ``start == end`` is none.
    """

    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Summaries:
    """Pseudo-keys that stand for groups of keys which a query does not look at one by one.

    A summary has the mean of its keys, the mean of their values, and the logarithm of how many they are as an
    additional score, so that it weighs as much as if all of them lay at the mean. Both means are computed from the
    keys and values that are attended, with gradients to them.

    There may be several levels of them, such as small groups and large ones: each key belongs to at most one summary
    of a level, and a query attends, of level r, the summaries from ``first[r]`` to ``stop[r] - 1`` but those that it
    opened, whose keys it attends by another proposal. Levels share one numbering.

    A summary must hold nothing that a query which attends it may not see: no later key where attention is causal, no
    key of another document. Padding and keys that are columns are left out of their summaries by the router.

    Attributes:
        members: int32 ``[B or 1, Hkv or 1, R, M]``: the summary of level r that each key belongs to, -1 = none.
        count: C, how many there are in all; one without keys is not attended.
        first, stop: int32 ``[B or 1, N, R]``.
        opened: int32 ``[B or 1, G or 1, N, P]``: -1 = none; ``None``: no query opens any.
        made: means of keys ``[B, Hkv, C, D]``, means of values ``[B, Hkv, C, Dv]`` and logarithms of sizes
            ``[B, Hkv, C]``, where a cache has them, for inference only, or where other ranks have some of the keys. A
            source leaves it out. In return, a source that keeps a state must not change the members of a summary that
            some query has seen, nor its number as long as ``count`` is the same.
        seen: ``first`` and ``stop`` as numbers, where the source has them and they are the same for all queries and
            batch elements. A cache on a GPU has to wait for the device to read the tensors.
    """

    members: Tensor
    count: int
    first: Tensor
    stop: Tensor
    opened: Tensor | None = None
    made: tuple[Tensor, Tensor, Tensor] | None = None
    seen: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def levels(self) -> int:
        return self.members.shape[2]


_SMALL = 4096


class KnownTensors:
    """Index tensors that were found in bounds before: what a source keeps in a cache is looked at once, not in every
    step. On a GPU, those that are being looked at: the program ends if one is not."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, int]] = {}
        self._intervals: dict[str, tuple[Tensor, Tensor, int, int, int]] = {}
        self.passed = False
        """Whether proposals of the source were looked at in every respect."""

    def unchecked(self, tensor: Tensor, what: str) -> Tensor | None:
        """The part of ``tensor`` along its last axis that was not looked at yet; ``None``: all of it was."""
        known = self._known.get(what)
        if known is not None and known[0] is tensor and known[1] == tensor._version:
            return None
        if known is None or known[1] != tensor._version or known[0].data_ptr() != tensor.data_ptr():
            return tensor
        same = known[0].shape[:-1] == tensor.shape[:-1] and known[0].stride() == tensor.stride()
        length = known[0].shape[-1]
        return tensor[..., length:] if same and length <= tensor.shape[-1] else tensor

    def keep(self, tensor: Tensor, what: str) -> None:
        """Remember a tensor that passed."""
        # what is kept here holds its memory, so no other can have its address
        self._known[what] = (tensor, tensor._version)

    def has_interval(self, first: Tensor, last: Tensor, high: int, what: str) -> bool:
        """Whether the last bounds that passed are these very tensors, below the same ``high``."""
        known = self._intervals.get(what)
        if known is None or known[0] is not first or known[1] is not last:
            return False
        return known[2:] == (first._version, last._version, high)

    def keep_interval(self, first: Tensor, last: Tensor, high: int, what: str) -> None:
        """Remember bounds that passed, unless they are worth memory; or of inference mode, where none tells that it
        changes."""
        if first.numel() + last.numel() <= _SMALL and not (first.is_inference() or last.is_inference()):
            self._intervals[what] = first, last, first._version, last._version, high


Proposal: TypeAlias = Band | Columns | Spans | Candidates | Ranges | Summaries


def _int32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32)


class Bounds(NamedTuple):
    """``low <= first <= last <= high`` must hold for every element.

    ``first, last``: int32 or int64, of shapes that broadcast; the same tensor twice where there is one only.
    """

    first: Tensor
    last: Tensor
    low: int
    high: int


def _check_integer(tensor: object, what: str, source: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ProposalError(f"source {source!r}: {what} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ProposalError(f"source {source!r}: {what} must be int32 (int64 is converted), got {tensor.dtype}")
    return tensor


def _check_shape(tensor: Tensor, sizes: tuple[tuple[str, int | None], ...], what: str, source: str) -> None:
    """Every dimension is its size or 1; ``None`` is free."""
    fits = tensor.dim() == len(sizes)
    if fits:
        for actual, (_, size) in zip(tensor.shape, sizes, strict=True):
            fits = fits and (size is None or actual in (1, size))
    if not fits:
        want = ", ".join(name if size is None else f"{name}={size} or 1" for name, size in sizes)
        raise ProposalError(f"source {source!r}: {what} must have shape [{want}], got {list(tensor.shape)}")


def require(holds: Tensor, message: Callable[[], str]) -> None:
    """Raise `ProposalError` unless ``holds`` (0-dim bool). On CUDA the device checks it when it gets there, since
    asking for the answer would make the host wait: a broken proposal then stops the program a little later."""
    if holds.device.type == "cuda":
        torch._assert_async(holds, "a neighbor source returned an invalid proposal; run it on the CPU to see which")
    elif not bool(holds):
        raise ProposalError(message())


def _check_bounds(
    tensor: Tensor, low: int, high: int, what: str, call: _Call, known: KnownTensors | None = None
) -> None:
    if call.trusted:
        return
    unknown = tensor if known is None else known.unchecked(tensor, what)
    if unknown is not None and unknown.numel():
        if call.pending is not None:
            call.pending.append(Bounds(unknown, unknown, low, high))
        else:
            _require_bounds(unknown, low, high, what, call.source)
    if known is not None:
        known.keep(tensor, what)


def _require_bounds(tensor: Tensor, low: int, high: int, what: str, source: str) -> None:
    if _starts_fast(tensor):
        numbers = tensor.numpy()
        if low <= numbers.min() and numbers.max() <= high:
            return
    smallest, largest = torch.aminmax(tensor)
    require(
        (smallest >= low) & (largest <= high),
        lambda: (
            f"source {source!r}: {what} must lie in [{low}, {high}], got values in [{int(smallest)}, {int(largest)}]"
        ),
    )


def _starts_fast(tensor: Tensor) -> bool:
    """Whether NumPy looks at it sooner than torch, which counts in a decode step."""
    return tensor.numel() <= _SMALL and tensor.device.type == "cpu"


def _check_interval(first: Tensor, last: Tensor, high: int, names: tuple[str, str], call: _Call) -> None:
    """``0 <= first <= last <= high``; shapes broadcast."""
    if call.trusted or (call.known is not None and call.known.has_interval(first, last, high, names[0])):
        return
    if call.pending is not None:
        call.pending.append(Bounds(first, last, 0, high))
        holds = True
    elif _starts_fast(first) and _starts_fast(last) and first.numel() and last.numel():
        low, up = first.numpy(), last.numpy()
        holds = low.min() >= 0 and up.max() <= high and bool((low <= up).all())
    else:
        holds = False
    if not holds:  # or it is not known yet
        for bound, name in zip((first, last), names, strict=True):
            _check_bounds(bound, 0, high, name, call)
        require((first <= last).all(), lambda: f"source {call.source!r}: {names[0]} must not exceed {names[1]}")
    if call.known is not None:
        call.known.keep_interval(first, last, high, names[0])


def _check_device(tensor: Tensor, device: torch.device, what: str, source: str) -> None:
    if tensor.device != device:
        raise ProposalError(f"source {source!r}: {what} is on {tensor.device}, the keys are on {device}")


@dataclass(frozen=True)
class _Call:
    """What a source was called with: B, G, Hkv, N, M; and what of its proposals need not be looked at again."""

    source: str
    batch: int
    graph_heads: int
    kv_heads: int
    queries: int
    keys: int
    device: torch.device
    known: KnownTensors | None
    trusted: bool
    pending: list[Bounds] | None

    @property
    def lead(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("B", self.batch), ("G", self.graph_heads)


def validate_proposals(
    proposed: object,
    source: str,
    *,
    batch: int,
    graph_heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    device: torch.device,
    known: KnownTensors | None = None,
    pending: list[Bounds] | None = None,
) -> list[Proposal]:
    """What ``propose`` returned, one proposal or several, as a list; with int32 indices.

    ``pending``: bounds of indices are added to it instead of being looked at; whoever calls looks at all of them at
    once.

    ``known``: what orders and members need not be looked at again, since the source keeps them in a cache. On CUDA,
    the values of later single queries are not looked at either: that takes more launches than all else.

    Raises:
        ProposalError: says what was expected and what came.
    """
    several = list(proposed) if isinstance(proposed, (list, tuple)) else [proposed]
    if not several:
        raise ProposalError(f"source {source!r}: propose() must return at least one proposal, got an empty sequence")
    trusted = known is not None and known.passed and queries == 1 and device.type == "cuda"
    call = _Call(source, batch, graph_heads, kv_heads, queries, keys, device, known, trusted, pending)
    validated = [_validate(proposal, call) for proposal in several]
    if known is not None:
        known.passed = True
    return validated


def _validate(proposal: object, call: _Call) -> Proposal:
    source = call.source
    if isinstance(proposal, Band):
        return proposal
    if isinstance(proposal, Columns):
        return _validate_columns(proposal, call)
    if isinstance(proposal, Candidates):
        indices = _check_integer(proposal.indices, "Candidates.indices", source)
        _check_shape(indices, (*call.lead, ("N", call.queries), ("C", None)), "Candidates.indices", source)
        _check_device(indices, call.device, "Candidates.indices", source)
        _check_bounds(indices, -1, call.keys - 1, "Candidates.indices", call)
        scores = proposal.scores
        if scores is not None and (scores.shape != indices.shape or not scores.is_floating_point()):
            raise ProposalError(
                f"source {source!r}: Candidates.scores must be floating point of shape {list(indices.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        return Candidates(_int32(indices), scores, proposal.guaranteed, proposal.keys_scored)
    if isinstance(proposal, Ranges):
        return _validate_ranges(proposal, call)
    if isinstance(proposal, Spans):
        bounds, names = (proposal.start, proposal.end), ("Spans.start", "Spans.end")
        start, end = _validate_interval(bounds, names, call.keys, (call.queries,), call)
        return Spans(start, end)
    if isinstance(proposal, Summaries):
        return _validate_summaries(proposal, call)
    raise ProposalError(
        f"source {source!r}: propose() must return Band, Columns, Spans, Candidates, Ranges or Summaries, or several "
        f"of them, got {type(proposal).__name__}"
    )


def _validate_interval(
    bounds: tuple[Tensor, Tensor], names: tuple[str, str], high: int, rows: tuple[int, ...], call: _Call
) -> tuple[Tensor, Tensor]:
    """First and one past the last, ``[B or 1, *rows]``."""
    source, batch = call.source, call.batch
    for bound, name in zip(bounds, names, strict=True):
        _check_integer(bound, name, source)
        if bound.dim() != 1 + len(rows) or bound.shape[0] not in (1, batch) or tuple(bound.shape[1:]) != rows:
            wanted = ", ".join(str(size) for size in rows)
            raise ProposalError(
                f"source {source!r}: {name} must have shape [B={batch} or 1, {wanted}], got {list(bound.shape)}"
            )
        _check_device(bound, call.device, name, source)
    first, last = bounds
    _check_interval(first, last, high, names, call)
    if first.shape != last.shape:
        first, last = torch.broadcast_tensors(first, last)
    return _int32(first), _int32(last)


def _validate_summaries(summaries: Summaries, call: _Call) -> Summaries:
    source = call.source
    count = summaries.count
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ProposalError(f"source {source!r}: Summaries.count must be an integer >= 0, got {count!r}")
    members = _check_integer(summaries.members, "Summaries.members", source)
    fits = members.dim() == 4 and members.shape[0] in (1, call.batch) and members.shape[1] in (1, call.kv_heads)
    if not fits or members.shape[3] != call.keys:
        raise ProposalError(
            f"source {source!r}: Summaries.members must have shape [B={call.batch} or 1, Hkv={call.kv_heads} or 1, R, "
            f"M={call.keys}], got {list(members.shape)}"
        )
    _check_device(members, call.device, "Summaries.members", source)
    _check_bounds(members, -1, count - 1, "Summaries.members", call, call.known)
    names = ("Summaries.first", "Summaries.stop")
    rows = (call.queries, members.shape[2])
    first, stop = _validate_interval((summaries.first, summaries.stop), names, count, rows, call)
    opened = summaries.opened
    if opened is not None:
        _check_integer(opened, "Summaries.opened", source)
        _check_shape(opened, (*call.lead, ("N", call.queries), ("P", None)), "Summaries.opened", source)
        _check_device(opened, call.device, "Summaries.opened", source)
        _check_bounds(opened, -1, count - 1, "Summaries.opened", call)
        opened = _int32(opened)
    return Summaries(_int32(members), count, first, stop, opened, seen=summaries.seen)


def _validate_columns(columns: Columns, call: _Call) -> Columns:
    source, keys = call.source, call.keys
    positions = columns.positions
    if isinstance(positions, Tensor):
        _check_integer(positions, "Columns.positions", source)
        if positions.dim() != 1:
            raise ProposalError(
                f"source {source!r}: Columns.positions must have shape [C], got {list(positions.shape)}"
            )
        _check_device(positions, call.device, "Columns.positions", source)
        _check_bounds(positions, 0, keys - 1, "Columns.positions", call)
        return Columns(_int32(positions), columns.slots)
    wrong = [p for p in positions if isinstance(p, bool) or not isinstance(p, int) or not 0 <= p < keys]
    if wrong:
        raise ProposalError(
            f"source {source!r}: Columns.positions must be integers in [0, {keys - 1}], got {wrong[0]!r}"
        )
    return Columns(tuple(positions), columns.slots)


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


def _validate_ranges(ranges: Ranges, call: _Call) -> Ranges:
    source = call.source
    if ranges.attend not in ("topk", "all"):
        raise ProposalError(f"source {source!r}: Ranges.attend must be 'topk' or 'all', got {ranges.attend!r}")
    if ranges.limit is not None and ranges.limit < 1:
        raise ProposalError(f"source {source!r}: Ranges.limit must be >= 1 or None, got {ranges.limit}")
    if (ranges.start is None) != (ranges.end is None):
        raise ProposalError(f"source {source!r}: Ranges.start and Ranges.end must both be given, or both be None")
    order, orders, length = ranges.order, 1, call.keys
    if order is not None:
        order = _check_integer(order, "Ranges.order", source)
        heads = ("Hkv", call.kv_heads) if order.dim() == 4 and order.shape[1] == call.kv_heads else call.lead[1]
        _check_shape(order, (call.lead[0], heads, ("S", None), ("L", None)), "Ranges.order", source)
        _check_device(order, call.device, "Ranges.order", source)
        _check_bounds(order, 0, call.keys - 1, "Ranges.order", call, call.known)
        order = _int32(order)
        orders, length = order.shape[2], order.shape[3]
    if ranges.start is None or ranges.end is None:
        return Ranges(order, None, None, ranges.attend, ranges.limit)
    start = _check_integer(ranges.start, "Ranges.start", source)
    end = _check_integer(ranges.end, "Ranges.end", source)
    for name, tensor in (("start", start), ("end", end)):
        what = f"Ranges.{name}"
        _check_shape(tensor, (*call.lead, ("N", call.queries), ("S", None), ("P", None)), what, source)
        if tensor.shape[3] != orders:
            raise ProposalError(
                f"source {source!r}: {what} has {tensor.shape[3]} orders in dimension 3, Ranges.order has {orders}"
            )
        _check_device(tensor, call.device, what, source)
    if start.shape != end.shape:
        raise ProposalError(
            f"source {source!r}: Ranges.start {list(start.shape)} and Ranges.end {list(end.shape)} differ in shape"
        )
    _check_interval(start, end, length, ("Ranges.start", "Ranges.end"), call)
    return Ranges(order, _int32(start), _int32(end), ranges.attend, ranges.limit)
