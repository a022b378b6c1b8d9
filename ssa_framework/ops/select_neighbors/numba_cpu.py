"""Selection on the CPU: Numba kernels over blocks of queries of one graph head, one task per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.numba_runtime import Workspace, as_array, as_matrices, parallel_for
from ssa_framework.ops.select_neighbors.numba_choose import (
    CONTENT,
    FORCED,
    GUARANTEED,
    bitmap_size,
    choose,
    choose_from_slices,
    join,
    keep_above,
    score_lists,
)
from ssa_framework.ops.select_neighbors.numba_few import are_few, select_few
from ssa_framework.ops.select_neighbors.numba_ranges import GROUP, STRIP, clip_slices, expand_slices, score_slices
from ssa_framework.ops.select_neighbors.types import Eligible, Proposed, Selection, most_listed
from ssa_framework.proposals import Candidates, Ranges

Array = np.ndarray[Any, Any]

_BLOCK_ROWS = 8192
_BLOCK_CANDIDATES = 2**22
"""Most candidates of one block of queries: 16 MiB of scores. Larger blocks hold more queries that share a slice."""
_SCAN_ROWS = 128
_SCAN_TILE = 4096


@dataclass(frozen=True)
class _Found:
    """Candidates of a block of queries: those of row r are ``offsets[r]:offsets[r + 1]``."""

    offsets: Array
    keys: Array
    scores: Array
    owners: Array


@dataclass(frozen=True)
class _Task:
    """What is the same for all queries of one block."""

    q: Array  # [R, D]
    k: Array  # [M, D]
    batch: int
    head: int
    rows: slice
    positions: Array  # [R]
    causal: bool
    band: Array
    columns: Array
    key_keep: Array
    query_segments: Array
    key_segments: Array
    space: Workspace


def select(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> Selection:
    """See `ssa_framework.ops.select_neighbors.api.select_neighbors`."""
    batch, heads, queries, _ = q.shape
    count = k.shape[2]
    ordered = sorted(proposed, key=lambda p: (not p.is_forced, not p.is_guaranteed))
    kinds = np.array([FORCED if p.is_forced else GUARANTEED if p.is_guaranteed else CONTENT for p in ordered])
    width = min(budget, sum(most_listed(p.proposal, count) for p in ordered if not p.is_forced))
    forced_width = sum(_longest(p.proposal, count) for p in ordered if p.is_forced)
    only = ordered[0].proposal if len(ordered) == 1 and kinds[0] == CONTENT else None
    if isinstance(only, Ranges) and not only.is_everything and are_few(q, k, eligible):
        longest = _longest(only, count)
        neighbors, filled, pairs = select_few(q, k, only, eligible, budget, longest, width)
        name = ordered[0].source
        return Selection(neighbors, {name: torch.tensor(filled)}, {name: torch.tensor(pairs)})
    neighbors = torch.empty((batch, heads, queries, width + min(forced_width, count)), dtype=torch.int32)
    per_row = max(1, sum(_longest(p.proposal, count) for p in ordered))
    step = max(1, min(_BLOCK_ROWS, _BLOCK_CANDIDATES // per_row))
    if any(_is_scan(p) for p in ordered):
        step = min(step, _SCAN_ROWS)
    blocks = [slice(r, min(r + step, queries)) for r in range(0, queries, step)]
    # what stands in the padding may be NaN, which compares with nothing
    if eligible.mask.key_keep is not None and not eligible.zero_padding:
        k = k.masked_fill(~eligible.mask.key_keep[:, None, :, None], 0.0)
    q_array, k_array, out = as_array(q), as_matrices(k), neighbors.numpy()
    tables = _Tables(eligible)
    listed = np.zeros((batch * heads * len(blocks), len(ordered)), dtype=np.int64)
    scored = np.zeros_like(listed)
    group = heads // k.shape[1]

    def body(number: int) -> None:
        pair, block = divmod(number, len(blocks))
        b, g = divmod(pair, heads)
        rows = blocks[block]
        out[b, g, rows].fill(-1)  # here, so that all threads map fresh pages
        task = tables.task(q_array[b, g, rows], k_array[b, g // group], b, g, rows)
        counts = listed[number], scored[number]
        if isinstance(only, Ranges) and not only.is_everything:
            _choose_from_slices(task, _slices(task, only), budget, out[b, g, rows], *counts)
        else:
            found = _collect(task, ordered, scored[number], budget)
            _choose(task, found, kinds, budget, out[b, g, rows], *counts)

    parallel_for(body, batch * heads * len(blocks))
    listed_sum, scored_sum = torch.from_numpy(listed.sum(0)), torch.from_numpy(scored.sum(0))
    if forced_width:
        neighbors = neighbors[..., : max(width, int((neighbors >= 0).sum(-1).max()))].contiguous()
    return Selection(
        neighbors,
        {p.source: listed_sum[i] for i, p in enumerate(ordered)},
        {p.source: scored_sum[i] for i, p in enumerate(ordered)},
    )


class _Tables:
    """The eligible keys as arrays."""

    def __init__(self, eligible: Eligible) -> None:
        mask = eligible.mask
        self.space = Workspace()
        self.causal = mask.causal
        self.positions = mask.positions.numpy()
        band = eligible.band
        self.band = np.array([band.before, band.after] if band is not None else [-1, -1], dtype=np.int64)
        none = torch.empty(0, dtype=torch.int32)
        self.columns = (none if eligible.columns is None else eligible.columns).contiguous().numpy()
        self.key_keep = None if mask.key_keep is None else mask.key_keep.contiguous().numpy()
        self.query_segments = None if mask.query_segments is None else mask.query_segments.long().numpy()
        self.key_segments = None if mask.key_segments is None else mask.key_segments.long().contiguous().numpy()

    def task(self, q: Array, k: Array, batch: int, head: int, rows: slice) -> _Task:
        def pick(table: Array | None, dtype: Any) -> Array:
            return np.empty(0, dtype) if table is None else table[batch if table.shape[0] > 1 else 0]

        positions = np.ascontiguousarray(self.positions[batch if self.positions.shape[0] > 1 else 0, rows])
        segments = pick(self.query_segments, np.int64)
        return _Task(
            q=q,
            k=k,
            batch=batch,
            head=head,
            rows=rows,
            positions=positions,
            causal=self.causal,
            band=self.band,
            columns=self.columns,
            key_keep=pick(self.key_keep, np.bool_),
            query_segments=np.ascontiguousarray(segments[rows] if segments.size else segments),
            key_segments=pick(self.key_segments, np.int64),
            space=self.space,
        )


def _longest(proposal: Candidates | Ranges, count: int) -> int:
    """The most candidates that a query gets from a proposal, repeats included."""
    if isinstance(proposal, Candidates):
        return proposal.indices.shape[-1]
    if proposal.start is None or proposal.end is None:
        orders = 1 if proposal.order is None else proposal.order.shape[2]
        return orders * min(count, proposal.limit or count)
    slices = proposal.start.shape[3] * proposal.start.shape[4]
    if proposal.limit is not None:
        return slices * min(count, proposal.limit)
    lengths = (proposal.end - proposal.start).flatten(3)
    return int(lengths.sum(-1).max()) if lengths.numel() else 0


def _is_scan(p: Proposed) -> bool:
    return isinstance(p.proposal, Ranges) and p.proposal.is_everything and not p.is_forced


def _collect(task: _Task, ordered: Sequence[Proposed], scored: Array, budget: int) -> _Found:
    found: _Found | None = None
    for owner, p in enumerate(ordered):
        if isinstance(p.proposal, Candidates):
            more = _from_lists(task, p.proposal, owner, scored=not p.is_guaranteed)
        elif _is_scan(p):
            more = _from_scan(task, owner, budget + _forced(ordered, task), scored)
        else:
            more = _from_ranges(task, p.proposal, owner)
        found = more if found is None else _joined(found, more)
    assert found is not None
    return found


def _forced(ordered: Sequence[Proposed], task: _Task) -> int:
    """Keys attended whole may be the best ones of a scan, and do not count against its budget."""
    return sum(_longest(p.proposal, task.k.shape[0]) for p in ordered if p.is_forced)


def _pick(tensor: Tensor, task: _Task) -> Tensor:
    """The batch element and graph head of a task, of a tensor that may broadcast over both."""
    return tensor[task.batch if tensor.shape[0] > 1 else 0, task.head if tensor.shape[1] > 1 else 0]


def _from_lists(task: _Task, proposal: Candidates, owner: int, scored: bool) -> _Found:
    rows = task.positions.shape[0]
    lists = _pick(proposal.indices, task)
    lists = lists[task.rows] if lists.shape[0] > 1 else lists
    keys = np.ascontiguousarray(lists.numpy())
    scores = np.zeros((rows, keys.shape[1]), dtype=task.q.dtype)
    if scored and proposal.scores is not None:
        given = _pick(proposal.scores, task)
        given = given[task.rows] if given.shape[0] > 1 else given
        scores[:] = as_array(given)
    elif scored:
        score_lists(task.q, task.k, keys, scores)
    offsets = np.arange(rows + 1, dtype=np.int64) * keys.shape[1]
    flat = np.ascontiguousarray(np.broadcast_to(keys, scores.shape)).ravel()
    return _Found(offsets, flat, scores.ravel(), np.full(flat.shape, owner, dtype=np.int8))


@dataclass(frozen=True)
class _Slices:
    """The scored slices of one `Ranges` for a block of queries; see the kernels for the arrays."""

    order: Array
    firsts: Array
    offsets: Array
    scores: Array

    @property
    def per_query(self) -> int:
        return self.firsts.shape[1]


def _slices(task: _Task, proposal: Ranges, owner: int = 0) -> _Slices:
    rows, count = task.positions.shape[0], task.k.shape[0]
    if proposal.order is None:
        order = np.arange(count, dtype=np.int32)[None]
    else:
        order = np.ascontiguousarray(_pick(proposal.order, task).numpy())
    if proposal.start is None or proposal.end is None:
        start = np.zeros((1, order.shape[0], 1), dtype=np.int32)
        end = np.full_like(start, order.shape[1])
    else:
        start_rows, end_rows = _pick(proposal.start, task), _pick(proposal.end, task)
        picked = task.rows if start_rows.shape[0] > 1 else slice(None)
        start, end = (np.ascontiguousarray(x[picked].numpy()) for x in (start_rows, end_rows))
    slices = start.shape[1] * start.shape[2]
    firsts = task.space.array(f"firsts{owner}", rows * slices, np.int32).reshape(rows, slices)
    offsets = task.space.array(f"offsets{owner}", rows * slices + 1, np.int64)
    clip_slices(order, start, end, task.positions, task.causal, proposal.limit or 0, firsts, offsets)
    scores = task.space.array(f"scores{owner}", int(offsets[-1]), task.q.dtype)
    work = task.space.array("work", (task.q.shape[1] + 1) * STRIP, task.q.dtype)
    integers = task.space.array("integers", order.shape[1] + 2 + rows * start.shape[2], np.int64)
    group = np.empty((GROUP, 4), dtype=np.int64)
    score_slices(task.q, task.k, order, firsts, offsets, scores, work, integers, group)
    return _Slices(order, firsts, offsets, scores)


def _from_ranges(task: _Task, proposal: Ranges, owner: int) -> _Found:
    slices = _slices(task, proposal, owner)
    keys = np.empty(slices.scores.size, dtype=np.int32)
    expand_slices(slices.order, slices.firsts, slices.offsets, keys)
    owners = np.full(keys.size, owner, dtype=np.int8)
    return _Found(slices.offsets[:: slices.per_query].copy(), keys, slices.scores, owners)


def _from_scan(task: _Task, owner: int, room: int, scored: Array) -> _Found:
    """The best ``room`` of all eligible keys of each query: products with tiles of keys, filtered as they come."""
    rows, count = task.positions.shape[0], task.k.shape[0]
    q, k = torch.from_numpy(task.q), torch.from_numpy(task.k)
    keys = torch.empty((rows, 2 * room), dtype=torch.int32).numpy()
    scores = torch.empty((rows, 2 * room), dtype=q.dtype).numpy()
    thresholds = np.full(rows, -np.inf, dtype=task.q.dtype)
    counts = np.zeros(rows, dtype=np.int64)
    seen = np.zeros(count, dtype=np.int32)
    pairs = 0
    reach = min(count, int(task.positions.max()) + 1) if task.causal else count
    for first in range(0, reach, _SCAN_TILE):
        tile = (q @ k[first : min(first + _SCAN_TILE, reach)].T).numpy()
        pairs += keep_above(
            tile, first, thresholds, counts, keys, scores, room, task.positions, task.causal, task.band,
            task.columns, task.key_keep, task.query_segments, task.key_segments, seen,
        )  # fmt: skip
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    filled = np.arange(2 * room)[None, :] < counts[:, None]
    scored[owner] += pairs - int(counts.sum())  # `choose` counts what it is given
    return _Found(offsets, keys[filled], scores[filled], np.full(int(offsets[-1]), owner, dtype=np.int8))


def _joined(a: _Found, b: _Found) -> _Found:
    total = a.keys.size + b.keys.size
    joined = _Found(
        np.empty_like(a.offsets),
        np.empty(total, np.int32),
        np.empty(total, a.scores.dtype),
        np.empty(total, np.int8),
    )
    join(
        a.offsets, a.keys, a.scores, a.owners, b.offsets, b.keys, b.scores, b.owners,
        joined.offsets, joined.keys, joined.scores, joined.owners,
    )  # fmt: skip
    return joined


def _choose(
    task: _Task, found: _Found, kinds: Array, budget: int, neighbors: Array, listed: Array, scored: Array
) -> None:
    count = task.k.shape[0]
    longest = max(int(np.diff(found.offsets).max()), neighbors.shape[1]) + 2
    choose(
        found.offsets, found.keys, found.scores, found.owners, kinds, task.positions, task.causal, task.band,
        task.columns, task.key_keep, task.query_segments, task.key_segments, budget, np.zeros(count, dtype=np.int32),
        np.empty(longest, np.int32), np.empty(longest, found.scores.dtype),
        np.zeros(bitmap_size(count), dtype=np.uint64), neighbors, np.zeros(count, dtype=np.int8), listed, scored,
    )  # fmt: skip


def _choose_from_slices(
    task: _Task, slices: _Slices, budget: int, neighbors: Array, listed: Array, scored: Array
) -> None:
    count = task.k.shape[0]
    longest = max(int(np.diff(slices.offsets[:: slices.per_query]).max()), neighbors.shape[1]) + 2
    totals = np.zeros(2, dtype=np.int64)
    choose_from_slices(
        slices.order, slices.firsts, slices.offsets, slices.scores, task.positions, task.causal, task.band,
        task.columns, task.key_keep, task.query_segments, task.key_segments, budget, np.zeros(count, dtype=np.int32),
        np.empty(longest, np.int32), np.empty(longest, slices.scores.dtype),
        np.zeros(bitmap_size(count), dtype=np.uint64), neighbors, totals,
    )  # fmt: skip
    listed[0] += totals[0]
    scored[0] += totals[1]
