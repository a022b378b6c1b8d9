"""Selection from candidate lists and from the slices of `Ranges`, in Triton.

For slices: 1. clip: the slices of each query as the limit leaves them; 2. group: the pairs (query, slice) by the first
place of the slice; 3. score: tiles of such pairs against the keys of their slices, on the matrix units; 4. choose: per
query, the best of its scores. Graph heads and rows are taken in chunks whose scores fit `WORK_BYTES`. Where other
proposals are there, what is chosen so is one candidate list more, and 5. merge: per query, one list of all. Nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ssa_framework.ops.select_neighbors.triton_choose import choose_kernel
from ssa_framework.ops.select_neighbors.triton_merge import CandidateList, merge_kernel
from ssa_framework.ops.select_neighbors.triton_repeats import Places, find_places
from ssa_framework.ops.select_neighbors.triton_score import Allowed, Pairs, Rows, score_kernel, search_kernel
from ssa_framework.ops.select_neighbors.triton_slices import (
    Clipped,
    Slices,
    clip_kernel,
    count_kernel,
    group_kernel,
)
from ssa_framework.ops.select_neighbors.types import Eligible, Proposed, Selection, most_listed
from ssa_framework.ops.triton_runtime import INTERPRETED, launches
from ssa_framework.proposals import Candidates, Ranges

WORK_BYTES = 2**31
"""What the scores of one chunk may take."""
_COUNTERS = 1024
_CLIP_SLOTS = 512
_GROUP_BLOCK = 1024
_MOST_SCORES = 2**14
"""Scores of one query that the choosing kernel holds at once."""
_MOST_LISTED = 2048
"""Keys of one query that the merging kernel holds at once."""


class ScoreTile(NamedTuple):
    """How the scoring kernel is run; ``registers`` per thread, at most (``None``: as the compiler likes)."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None


class ChooseRun(NamedTuple):
    """How the choosing kernel is run."""

    warps: int
    registers: int | None


def score_tile(dtype: torch.dtype, head_dim: int) -> ScoreTile:
    # a single warp waits at no barrier, and twelve such programs fit a multiprocessor
    if head_dim * dtype.itemsize > 256:
        return ScoreTile(16, 16, 1, 2, None)
    return ScoreTile(32, 32, 1, 2, 168)


def choose_run(scores: int) -> ChooseRun:
    """For so many scores of a query."""
    return ChooseRun(max(1, min(8, scores // 1024)), 64)


class MergeRun(NamedTuple):
    """How the merging kernel is run; ``dims``: coordinates of the gathered rows at a time."""

    warps: int
    dims: int


def merge_run(columns: int, dtype: torch.dtype, head_dim: int) -> MergeRun:
    """For so many keys of a query."""
    warps = max(1, min(8, columns // 128))
    dims = max(16, 4096 * warps // (columns * dtype.itemsize))  # a tile of 4 KiB a warp
    return MergeRun(warps, min(dims, max(16, triton.next_power_of_2(head_dim))))


def why_not(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> str | None:
    """Why `select` cannot serve a call; ``None`` if it can."""
    if q.device.type != "cuda" and not (INTERPRETED.value and q.device.type == "cpu"):
        return f"it serves CUDA tensors, got {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or q.dtype != k.dtype:
        return f"it serves float16, bfloat16 and float32, got {q.dtype} and {k.dtype}"
    if q.shape[3] > 256:
        return f"it serves head dims up to 256, got {q.shape[3]}"
    if eligible.mask.has_explicit:
        return "attn_mask and mask_mod are looked up edge by edge, which its selection does not do"
    for p in proposed:
        if p.is_forced:
            return f"{p.source} is attended whole, and it serves what is guaranteed or chosen by score"
        if isinstance(p.proposal, Ranges) and _room(p.proposal, k.shape[2]) > _MOST_SCORES:
            return (
                f"it holds {_MOST_SCORES} scores of a query, and the slices of {p.source} with their limit may have "
                f"{_room(p.proposal, k.shape[2])}"
            )
    widths = {p.source: _listed_width(p.proposal, k.shape[2], budget) for p in proposed}
    if sum(widths.values()) > _MOST_LISTED:
        asked = ", ".join(f"{name} {width}" for name, width in widths.items())
        return f"it holds {_MOST_LISTED} listed keys of a query, and there may be {sum(widths.values())} ({asked})"
    return None


def _listed_width(proposal: Candidates | Ranges, keys: int, budget: int) -> int:
    """The width of a proposal's list before merging."""
    if isinstance(proposal, Candidates):
        return proposal.indices.shape[-1]
    return min(budget, most_listed(proposal, keys))


def _slots(ranges: Ranges) -> int:
    if ranges.start is None:
        return 1 if ranges.order is None else ranges.order.shape[2]
    return ranges.start.shape[3] * ranges.start.shape[4]


def _length(ranges: Ranges, keys: int) -> int:
    return keys if ranges.order is None else ranges.order.shape[3]


def _room(ranges: Ranges, keys: int) -> int:
    """Scores that a query has room for; a multiple of 16 bytes."""
    length = _length(ranges, keys)
    return triton.cdiv(_slots(ranges) * (length if ranges.limit is None else min(length, ranges.limit)), 4) * 4


@launches
def select(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> Selection:
    """See `ssa_framework.ops.select_neighbors.api.select_neighbors`; `why_not` must have nothing against it."""
    # A key that is also proposed by score keeps its guarantee.
    ordered = sorted(proposed, key=lambda p: not p.is_guaranteed)
    allowed = _allowed(eligible, k.shape[2])
    counts = torch.zeros((3, len(ordered), _COUNTERS), dtype=torch.int64, device=q.device)
    listed, scored, unmerged = counts.unbind()
    first = ordered[0].proposal
    if len(ordered) == 1 and isinstance(first, Ranges):
        neighbors = _choose_from(q, k, first, eligible, allowed, budget, listed[0], scored[0])
    else:
        lists = [
            _from_ranges(_choose_from(q, k, p.proposal, eligible, allowed, budget, unmerged[i], scored[i]), listed[i])
            if isinstance(p.proposal, Ranges)
            else _from_candidates(p.proposal, listed[i], scored[i])
            for i, p in enumerate(ordered)
        ]
        guaranteed = sum(p.is_guaranteed for p in ordered)
        width = min(budget, sum(most_listed(p.proposal, k.shape[2]) for p in ordered))
        neighbors = _merge(q, k, lists, guaranteed, eligible, allowed, width)
    of_listed, of_scored = counts[:2].sum(-1)
    return Selection(
        neighbors,
        {p.source: of_listed[i] for i, p in enumerate(ordered)},
        {p.source: of_scored[i] for i, p in enumerate(ordered)},
    )


def _choose_from(
    q: Tensor,
    k: Tensor,
    ranges: Ranges,
    eligible: Eligible,
    allowed: Allowed,
    budget: int,
    listed: Tensor,
    scored: Tensor,
) -> Tensor:
    """The best of the slices of one proposal, ``[B, G, N, K]``."""
    batch, graph_heads, rows, _ = q.shape
    keys = k.shape[2]
    width = min(budget, most_listed(ranges, keys))
    neighbors = torch.empty((batch, graph_heads, rows, width), dtype=torch.int32, device=q.device)
    at_once = max(1, WORK_BYTES // (4 * _room(ranges, keys)))
    some_heads, some_rows = max(1, at_once // rows), min(rows, at_once)
    task = _Task(q, k, ranges, eligible, allowed, width, neighbors, listed, scored)
    for head in range(0, batch * graph_heads, some_heads):
        task.run(head, min(some_heads, batch * graph_heads - head), some_rows)
    return neighbors


def _from_ranges(chosen: Tensor, listed: Tensor) -> CandidateList:
    keys, strides = _lines(chosen)
    return CandidateList(keys, *strides, keys.shape[-1], None, 0, 0, 0, listed, None)


def _from_candidates(candidates: Candidates, listed: Tensor, scored: Tensor) -> CandidateList:
    keys, keys_strides = _lines(candidates.indices)
    width = keys.shape[-1]
    if candidates.guaranteed:
        return CandidateList(keys, *keys_strides, width, None, 0, 0, 0, listed, None)
    scores, scores_strides = (None, (0, 0, 0)) if candidates.scores is None else _lines(candidates.scores)
    return CandidateList(keys, *keys_strides, width, scores, *scores_strides, listed, scored)


def _lines(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``[B or 1, G or 1, N or 1, C]`` with neighbouring columns side by side, and its other strides."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, (_stride(x, 0), _stride(x, 1), _stride(x, 2))


def _merge(
    q: Tensor,
    k: Tensor,
    lists: Sequence[CandidateList],
    guaranteed: int,
    eligible: Eligible,
    allowed: Allowed,
    width: int,
) -> Tensor:
    """One list out of several, those of the first ``guaranteed`` before the others: ``[B, G, N, width]``."""
    batch, graph_heads, rows, head_dim = q.shape
    neighbors = torch.empty((batch, graph_heads, rows, width), dtype=torch.int32, device=q.device)
    size = max(16, triton.next_power_of_2(sum(one.width for one in lists)))
    run = merge_run(size, k.dtype, head_dim)
    merge_kernel[(rows, batch * graph_heads)](
        Rows(q, *q.stride()), Rows(k, *k.stride()), tuple(lists), allowed, neighbors, graph_heads, rows, _COUNTERS,
        LISTS=len(lists), GUARANTEED=guaranteed, KV_SHARE=graph_heads // k.shape[1], CAUSAL=eligible.mask.causal,
        BAND=eligible.band is not None, BUDGET=width, PADDED=max(16, triton.next_power_of_2(width)), SIZE=size,
        LOG_SIZE=size.bit_length() - 1, WIDE=k.shape[2] * size >= 2**31, D=head_dim, DIMS=run.dims,
        num_warps=run.warps,
    )  # fmt: skip
    return neighbors


class _Task:
    """The slices of one proposal: what is the same for all chunks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        ranges: Ranges,
        eligible: Eligible,
        allowed: Allowed,
        width: int,
        neighbors: Tensor,
        listed: Tensor,
        scored: Tensor,
    ) -> None:
        self.q, self.k, self.neighbors = q, k, neighbors
        self.listed, self.scored = listed, scored
        self.width = width
        self.graph_heads, self.rows, self.head_dim = q.shape[1:]
        self.keys = k.shape[2]
        self.length = _length(ranges, self.keys)
        self.limit = self.length if ranges.limit is None else min(self.length, ranges.limit)
        self.slots = _slots(ranges)
        self.per_order = 1 if ranges.start is None else ranges.start.shape[4]
        self.orders = self.slots // self.per_order
        self.room = _room(ranges, self.keys)
        self.causal = eligible.mask.causal
        self.slices = _slices(ranges, self.length)
        self.allowed = allowed
        self.has_band = eligible.band is not None

    def run(self, first_head: int, heads: int, some_rows: int) -> None:
        """All rows of some graph heads, ``some_rows`` at a time."""
        spans = torch.empty((heads, self.rows, self.slots, 2), dtype=torch.int32, device=self.q.device)
        clipped = Clipped(spans, torch.empty(spans.shape[:3], dtype=torch.int32, device=self.q.device))
        repeats = self.slots > 1
        edges = torch.zeros((2, heads, self.length + 1) if repeats else (1,), dtype=torch.int32, device=self.q.device)
        padded = triton.next_power_of_2(self.slots)
        block = max(1, _CLIP_SLOTS // padded)
        clip_kernel[(triton.cdiv(self.rows, block), heads)](
            self.slices, self.allowed.positions, self.allowed.positions_batch, clipped, edges, first_head,
            self.graph_heads, self.rows, self.limit, self.causal, self.slots, self.per_order, repeats, block, padded,
        )  # fmt: skip
        places = find_places(self.slices, edges, self.orders, first_head, self.graph_heads) if repeats else None
        for row in range(0, self.rows, some_rows):
            rows = min(some_rows, self.rows - row)
            pairs = Pairs(self.group(clipped.spans, row, rows), row, rows, self.rows)
            self.choose(self.score(pairs, clipped, places, first_head), pairs, clipped, first_head)

    def group(self, spans: Tensor, first_row: int, rows: int) -> Tensor:
        """Pairs (query, slice) of some rows by the first place of the slice: int32 ``[H, S, rows · P]``."""
        heads, device = spans.shape[0], spans.device
        starts = torch.zeros(heads * self.orders * (self.length + 1) + 1, dtype=torch.int32, device=device)
        pairs = torch.empty((heads, self.orders, rows * self.per_order), dtype=torch.int32, device=device)
        grid = (triton.cdiv(rows * self.slots, _GROUP_BLOCK), heads)
        sizes = (first_row, rows, self.rows, self.length, self.slots, self.per_order, _GROUP_BLOCK)
        count_kernel[grid](spans, starts, *sizes)
        group_kernel[grid](spans, starts.cumsum(0, dtype=torch.int32), pairs, *sizes)
        return pairs

    def score(self, pairs: Pairs, clipped: Clipped, places: Places | None, first_head: int) -> Tensor:
        """Float32 ``[H, rows, room]``."""
        heads = clipped.spans.shape[0]
        scores = torch.empty((heads, pairs.rows, self.room), dtype=torch.float32, device=self.q.device)
        tile = score_tile(self.q.dtype, self.head_dim)
        tiles = triton.cdiv(pairs.rows * self.per_order, tile.queries)
        tensors = (
            Rows(self.q, *self.q.stride()), Rows(self.k, *self.k.stride()), pairs, self.slices, clipped, places,
            self.allowed, scores, first_head, self.graph_heads,
        )  # fmt: skip
        constants: dict[str, Any] = {
            "KV_SHARE": self.graph_heads // self.k.shape[1],
            "ORDERS": self.orders,
            "PER_ORDER": self.per_order,
            "ROOM": self.room,
            "BAND": self.has_band,
            "D": self.head_dim,
            "WIDTH": max(16, triton.next_power_of_2(self.head_dim)),
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        }
        score_kernel[(tiles, self.orders, heads)](*tensors, **constants)
        if places is not None:
            search_kernel[(min(_COUNTERS, tiles * self.orders * heads),)](*tensors, heads, **constants)
        return scores

    def choose(self, scores: Tensor, pairs: Pairs, clipped: Clipped, first_head: int) -> None:
        size = max(16, triton.next_power_of_2(self.room))
        listed = max(2, triton.next_power_of_2(self.width))
        run = choose_run(size)
        choose_kernel[(pairs.rows, scores.shape[0])](
            scores, self.slices, clipped, self.neighbors, self.listed, self.scored, first_head, self.graph_heads,
            pairs.first_row, self.rows, self.keys, _COUNTERS,
            BUDGET=self.width, SLOTS=self.slots, PER_ORDER=self.per_order, ROOM=self.room, SIZE=size,
            SMALL=max(16, size // 2), SORTED=listed, LOG_SORTED=listed.bit_length() - 1,
            num_warps=run.warps, maxnreg=run.registers,
        )  # fmt: skip


def _slices(ranges: Ranges, length: int) -> Slices:
    start = end = order = None
    strides, order_strides = (0, 0, 0), (0, 0)
    slot = order_order = 0
    if ranges.start is not None and ranges.end is not None:
        start, end = ranges.start.contiguous(), ranges.end.contiguous()
        strides, slot = (_stride(start, 0), _stride(start, 1), _stride(start, 2)), 1
    if ranges.order is not None:
        order = ranges.order if ranges.order.stride(3) == 1 else ranges.order.contiguous()
        order_strides, order_order = (_stride(order, 0), _stride(order, 1)), order.stride(2)
    return Slices(start, end, *strides, slot, order, *order_strides, order_order, length)


def _stride(x: Tensor, dim: int) -> int:
    """0 where a dimension of size 1 broadcasts."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _allowed(eligible: Eligible, keys: int) -> Allowed:
    mask, columns, band = eligible.mask, eligible.columns, eligible.band
    open_keys = None if mask.key_keep is None else mask.key_keep.to(torch.uint8)
    if columns is not None and columns.numel():
        if open_keys is None:
            open_keys = torch.ones((1, keys), dtype=torch.uint8, device=columns.device)
        open_keys = open_keys.index_fill(1, columns.long(), 0)
    positions, positions_batch = _per_batch(mask.positions)
    open_keys, open_keys_batch = _per_batch(open_keys)
    query_segments, query_segments_batch = _per_batch(mask.query_segments)
    key_segments, key_segments_batch = _per_batch(mask.key_segments)
    return Allowed(
        positions,
        positions_batch,
        open_keys,
        open_keys_batch,
        query_segments,
        query_segments_batch,
        key_segments,
        key_segments_batch,
        0 if band is None else band.before,
        0 if band is None else band.after,
    )


def _per_batch(table: Tensor | None) -> tuple[Tensor | None, int]:
    """``[B or 1, X]``, contiguous, and its stride along the batch."""
    if table is None:
        return None, 0
    table = table.contiguous()
    return table, _stride(table, 0)
