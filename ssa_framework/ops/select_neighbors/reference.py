"""The oracle of selection: every pair scored, Python sets, one query at a time. Tiny sizes only.

Scores that a source gives are exact by contract, so they are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssa_framework.ops.select_neighbors.types import Eligible, Proposed, Selection
from ssa_framework.proposals import Candidates, Ranges

MAX_ELEMENTS = 2**22


def select(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> Selection:
    """See `ssa_framework.ops.select_neighbors.api.select_neighbors`."""
    batch, heads, queries, _ = q.shape
    count = k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys_per_head = k.repeat_interleave(heads // k.shape[1], dim=1)
    scores = q.to(compute) @ keys_per_head.to(compute).transpose(-1, -2)  # [B, G, N, M]
    every_key = torch.arange(count, dtype=torch.int32, device=q.device).expand(batch, heads, queries, count)
    allowed = eligible.mask.allowed(every_key, eligible.num_heads).expand_as(every_key)
    ordered = sorted(proposed, key=lambda p: (not p.is_forced, not p.is_guaranteed))
    listed = {p.source: 0 for p in proposed}
    scored = {p.source: 0 for p in proposed}
    rows: list[list[int]] = []
    for b in range(batch):
        for g in range(heads):
            for n in range(queries):
                position = int(eligible.mask.positions[b if eligible.mask.positions.shape[0] > 1 else 0, n])
                ok = {m for m in range(count) if allowed[b, g, n, m] and not _covered(m, position, eligible)}
                owner: dict[int, int] = {}
                for number, p in enumerate(ordered):
                    members = _members(p.proposal, b, g, n, position, count, eligible.mask.causal) & ok
                    if not p.is_guaranteed:
                        scored[p.source] += len(members)
                        forced_keys = {m for m, i in owner.items() if ordered[i].is_forced}
                        members = set(_best(members - forced_keys, scores[b, g, n], budget))
                    for m in members:
                        owner.setdefault(m, number)
                forced = {m for m, number in owner.items() if ordered[number].is_forced}
                kept = [m for m, number in owner.items() if ordered[number].is_guaranteed and m not in forced]
                kept = sorted(kept)[:budget]
                rest = set(owner) - forced - {m for m, i in owner.items() if ordered[i].is_guaranteed}
                chosen = forced | set(kept) | set(_best(rest, scores[b, g, n], budget - len(kept)))
                for m in chosen:
                    listed[ordered[owner[m]].source] += 1
                rows.append(sorted(chosen))
    width = max((len(row) for row in rows), default=0)
    table = [row + [-1] * (width - len(row)) for row in rows]
    neighbors = torch.tensor(table, dtype=torch.int32, device=q.device).reshape(batch, heads, queries, width)
    return Selection(
        neighbors,
        {name: torch.tensor(n) for name, n in listed.items()},
        {name: torch.tensor(n) for name, n in scored.items()},
    )


def _best(members: set[int], scores: Tensor, budget: int) -> list[int]:
    return sorted(members, key=lambda m: (-float(scores[m]), m))[: max(0, budget)]


def _covered(key: int, position: int, eligible: Eligible) -> bool:
    band, columns = eligible.band, eligible.columns
    in_band = band is not None and position - band.before <= key <= position + band.after
    return in_band or (columns is not None and bool((columns == key).any()))


def _pick(tensor: Tensor, *index: int) -> Tensor:
    """Element of a tensor whose dimensions of size 1 broadcast."""
    return tensor[tuple(i if size > 1 else 0 for i, size in zip(index, tensor.shape, strict=False))]


def _members(
    proposal: Candidates | Ranges, b: int, g: int, n: int, position: int, count: int, causal: bool
) -> set[int]:
    if isinstance(proposal, Candidates):
        return set(_pick(proposal.indices, b, g, n).tolist()) - {-1}
    members: set[int] = set()
    orders = 1 if proposal.order is None else proposal.order.shape[2]
    for s in range(orders):
        order = list(range(count)) if proposal.order is None else _pick(proposal.order, b, g)[s].tolist()
        if proposal.start is None or proposal.end is None:
            slices = [(0, len(order))]
        else:
            starts, ends = _pick(proposal.start, b, g, n)[s], _pick(proposal.end, b, g, n)[s]
            slices = list(zip(starts.tolist(), ends.tolist(), strict=True))
        for start, end in slices:
            keys = order[start:end]
            before = [m for m in keys if m <= position]
            if causal:
                keys = before if proposal.limit is None else before[-proposal.limit :]
            elif proposal.limit is not None and len(keys) > proposal.limit:
                first = min(max(len(before) - proposal.limit // 2, 0), len(keys) - proposal.limit)
                keys = keys[first : first + proposal.limit]
            members.update(keys)
    return members
