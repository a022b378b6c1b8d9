"""Selection in torch, for chunks of queries: expand the slices, drop repeats by sorting, score, keep the best.

Ties in score go to the earlier key, so that the result depends on the set of proposed keys alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssa_framework.ops.key_lists import cat_keys, in_band, sort_unique
from ssa_framework.ops.select_neighbors.types import Eligible, Proposed, Selection, most_listed
from ssa_framework.proposals import Candidates, Ranges

WORK_BYTES = 64 * 2**20
"""What the temporaries of one chunk may take, about."""
_SCAN_TILE = 2048
_DENSE_SCORING_RATIO = 16  # a product with all keys beats a gather of C of them up to about M = 16 C


def select(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> Selection:
    """See `ssa_framework.ops.select_neighbors.api.select_neighbors`."""
    batch, graph_heads, queries, _ = q.shape
    listed = {p.source: torch.zeros((), dtype=torch.int64, device=q.device) for p in proposed}
    scored = {p.source: torch.zeros((), dtype=torch.int64, device=q.device) for p in proposed}
    pieces: list[Tensor] = []
    start = 0
    while start < queries:
        width = max(_width(p.proposal, k.shape[2], start, queries) for p in proposed)
        step = _rows_at_once(q, k, width)
        rows = slice(start, min(start + step, queries))
        piece = _select_rows(q[:, :, rows], k, proposed, rows, eligible.rows(rows), budget, listed, scored)
        pieces.append(piece)
        start = rows.stop
    # The width follows from shapes alone: sums over a list are rounded by its width, and no query may feel what
    # other queries found.
    listed_width = min(budget, sum(most_listed(p.proposal, k.shape[2]) for p in proposed if not p.is_forced))
    width = max([listed_width, *(p.shape[-1] for p in pieces)])
    neighbors = torch.full((batch, graph_heads, queries, width), -1, dtype=torch.int32, device=q.device)
    start = 0
    for piece in pieces:
        neighbors[:, :, start : start + piece.shape[2], : piece.shape[-1]] = piece
        start += piece.shape[2]
    return Selection(neighbors, listed, scored)


def _width(proposal: Candidates | Ranges, keys: int, start: int, queries: int) -> int:
    """Candidates per query that a proposal expands to, at most, in the next rows."""
    if isinstance(proposal, Candidates):
        return max(1, proposal.indices.shape[-1])
    if proposal.is_everything:
        return min(keys, _SCAN_TILE)
    longest = keys if proposal.limit is None else min(keys, proposal.limit)
    if proposal.start is None or proposal.end is None:
        orders = 1 if proposal.order is None else proposal.order.shape[2]
        return max(1, orders * longest)
    lengths = proposal.end - proposal.start
    if lengths.numel() and proposal.limit is None:
        longest = int(lengths.max())
    return max(1, lengths.shape[3] * lengths.shape[4] * longest)


def _rows_at_once(q: Tensor, k: Tensor, width: int) -> int:
    per_candidate = 40  # keys, sort buffers and scores
    dense = k.shape[2] <= _DENSE_SCORING_RATIO * width
    scores = k.shape[2] * 4 if dense else width * q.shape[-1] * 4
    return max(1, WORK_BYTES // max(1, q.shape[0] * q.shape[1] * (width * per_candidate + scores)))


def _select_rows(
    q: Tensor,
    k: Tensor,
    proposed: Sequence[Proposed],
    rows: slice,
    eligible: Eligible,
    budget: int,
    listed: dict[str, Tensor],
    scored: dict[str, Tensor],
) -> Tensor:
    # Guaranteed keys come first, so that a key that is also proposed by score keeps its guarantee.
    ordered = sorted(proposed, key=lambda p: (not p.is_forced, not p.is_guaranteed))
    keys, scores, owner = [], [], []
    keep = budget
    for number, p in enumerate(ordered):
        if isinstance(p.proposal, Ranges) and p.proposal.is_everything and not p.is_forced:
            found, score, pairs = _scan(q, k, eligible, keep)
        else:
            found, given = _candidates(q, p.proposal, rows, eligible)
            pairs = (found >= 0).sum()
            if p.is_guaranteed:
                score = torch.zeros(found.shape, dtype=torch.float32, device=q.device)
                pairs = torch.zeros_like(pairs)
            else:
                score = _exact_scores(q, k, found) if given is None else given
            score = score.masked_fill(found < 0, float("-inf"))
            if not p.is_guaranteed:
                found, score = _keep_best(found, score, keep)
            elif p.is_forced:  # the best of the others may be among these, which do not count against the budget
                keep += int((found >= 0).sum(-1).max()) if found.numel() else 0
        scored[p.source] += pairs
        keys.append(found)
        scores.append(score)
        owner.append(torch.full_like(found, number))
    if len(ordered) == 1 and not ordered[0].is_guaranteed:
        listed[ordered[0].source] += (keys[0] >= 0).sum()
        return keys[0]
    return _merge(ordered, cat_keys(keys), cat_keys(scores), cat_keys(owner), budget, listed)


def _merge(
    ordered: Sequence[Proposed],
    keys: Tensor,
    scores: Tensor,
    owner: Tensor,
    budget: int,
    listed: dict[str, Tensor],
) -> Tensor:
    """One list out of those of all sources: repeats dropped, forced and guaranteed keys first, then the best."""
    last = torch.iinfo(torch.int32).max
    keys, place = torch.where(keys < 0, last, keys).sort(dim=-1, stable=True)
    scores, owner = scores.gather(-1, place), owner.gather(-1, place)
    fresh = keys != last
    fresh[..., 1:] &= keys[..., 1:] != keys[..., :-1]
    forced = torch.tensor([p.is_forced for p in ordered], device=keys.device)[owner.long()] & fresh
    guaranteed = torch.tensor([p.is_guaranteed for p in ordered], device=keys.device)[owner.long()] & fresh
    compete = fresh & ~forced
    scores = torch.where(compete, torch.where(guaranteed, float("inf"), scores), float("-inf"))
    chosen = forced | (_best_mask(scores, budget) & compete)
    for number, p in enumerate(ordered):
        listed[p.source] += (chosen & (owner == number)).sum()
    width = min(keys.shape[-1], budget if not bool(forced.any()) else budget + int(forced.sum(-1).max()))
    return _compact(keys, chosen, width)


def _best_mask(scores: Tensor, budget: int) -> Tensor:
    """bool like ``scores [..., C]``: the ``budget`` highest of each row above -inf, the first ones of equals."""
    real = scores > float("-inf")
    if scores.shape[-1] <= budget:
        return real
    threshold = scores.topk(budget, dim=-1).values[..., -1:]
    above = scores > threshold
    equal = (scores == threshold) & real
    room = budget - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _compact(keys: Tensor, chosen: Tensor, width: int) -> Tensor:
    """The chosen keys of each row in their order, then -1: ``[..., width]``."""
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
    out = torch.full((*keys.shape[:-1], width + 1), -1, dtype=torch.int32, device=keys.device)
    out.scatter_(-1, place, keys)
    return out[..., :width]


def _keep_best(keys: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The best ``budget`` of ascending ``keys``, ascending again, with their scores; ``[..., <= budget]``."""
    chosen = _best_mask(scores, budget)
    width = min(budget, keys.shape[-1])
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
    kept = torch.full((*scores.shape[:-1], width + 1), -1, dtype=torch.int32, device=keys.device)
    kept.scatter_(-1, place, keys.expand_as(place))
    best = scores.new_full((*scores.shape[:-1], width + 1), float("-inf"))
    best.scatter_(-1, place, scores)
    return kept[..., :width], best[..., :width].masked_fill(kept[..., :width] < 0, float("-inf"))


def _candidates(
    q: Tensor, proposal: Candidates | Ranges, rows: slice, eligible: Eligible
) -> tuple[Tensor, Tensor | None]:
    """The eligible keys of a proposal for some rows, ascending and unique ``[B, G, T, C]``, and scores if given."""
    batch, heads, queries, _ = q.shape
    if isinstance(proposal, Ranges):
        keys = expand_ranges(proposal, rows, eligible)
        scores = None
    else:
        keys = proposal.indices[:, :, rows] if proposal.indices.shape[2] > 1 else proposal.indices
        scores = proposal.scores
        if scores is not None:
            scores = scores[:, :, rows] if scores.shape[2] > 1 else scores
            last = torch.iinfo(torch.int32).max
            _, place = torch.where(keys < 0, last, keys).sort(dim=-1, stable=True)
            keys, scores = keys.gather(-1, place), scores.gather(-1, place).float()
            repeated = torch.zeros_like(keys, dtype=torch.bool)
            repeated[..., 1:] = keys[..., 1:] == keys[..., :-1]
            keys = torch.where(repeated, -1, keys)
            scores = scores.expand(batch, heads, queries, -1)
    keys = keys.expand(batch, heads, queries, -1)
    if scores is None:
        keys = sort_unique(keys)
    return torch.where(_is_eligible(keys, eligible), keys, -1), scores


def _is_eligible(keys: Tensor, eligible: Eligible) -> Tensor:
    """bool like ``keys [B or 1, G or 1, T, C]``; empty slots are not eligible."""
    allowed = (keys >= 0) & eligible.mask.allowed(keys.clamp(min=0), eligible.num_heads)
    if eligible.band is not None:
        allowed = allowed & ~in_band(keys, eligible.mask.positions, eligible.band)
    if eligible.columns is not None and eligible.columns.numel():
        place = torch.searchsorted(eligible.columns, keys.contiguous()).clamp(max=eligible.columns.numel() - 1)
        allowed = allowed & (eligible.columns[place] != keys)
    return allowed


def _exact_scores(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """Unscaled ``q·k`` of ``keys [B, G, T, C]``, float32 (float64 for float64 inputs)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, count = k.shape[1], k.shape[2]
    q = q.to(compute).unflatten(1, (kv_heads, -1))  # [B, Hkv, g, T, D]
    slots = keys.clamp(min=0).long()
    if count <= _DENSE_SCORING_RATIO * keys.shape[-1]:
        scores = (q.flatten(2, 3) @ k.to(compute).transpose(-1, -2)).unflatten(2, q.shape[2:4])
        return scores.flatten(1, 2).gather(-1, slots)
    batch, heads = keys.shape[:2]
    kv_head = torch.arange(heads, device=k.device) // (heads // kv_heads)
    first = (torch.arange(batch, device=k.device)[:, None] * kv_heads + kv_head) * count
    rows = k.reshape(-1, k.shape[-1]).index_select(0, (slots + first[:, :, None, None]).flatten())
    gathered = rows.view(*keys.shape, -1).to(compute)
    return (gathered @ q.flatten(1, 2)[..., None])[..., 0]


def _scan(q: Tensor, k: Tensor, eligible: Eligible, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact search, tile by tile of keys: best keys ascending, their scores, and how many pairs were scored."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    kv_heads, count = k.shape[1], k.shape[2]
    grouped = q.to(compute).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    best = torch.full((batch, heads, queries, 0), -1, dtype=torch.int32, device=q.device)
    best_scores = torch.empty((batch, heads, queries, 0), dtype=compute, device=q.device)
    pairs = torch.zeros((), dtype=torch.int64, device=q.device)
    reach = min(count, int(eligible.mask.positions.max()) + 1) if eligible.mask.causal else count
    for start in range(0, reach, _SCAN_TILE):
        stop = min(start + _SCAN_TILE, reach)
        scores = grouped @ k[:, :, start:stop].to(compute).transpose(-1, -2)
        scores = scores.unflatten(2, (-1, queries)).flatten(1, 2)  # [B, G, T, tile]
        keys = torch.arange(start, stop, dtype=torch.int32, device=q.device).view(1, 1, 1, -1)
        full = eligible.mask.has_explicit
        keys = keys.expand(batch if full else 1, heads if full else 1, queries, -1)
        allowed = _is_eligible(keys, eligible).expand(batch, heads, -1, -1)
        pairs += allowed.sum()
        scores = scores.masked_fill(~allowed, float("-inf"))
        found = torch.where(allowed, keys, -1)
        best, best_scores = _keep_best(
            torch.cat([best, found], dim=-1), torch.cat([best_scores, scores], dim=-1), budget
        )
    return best, best_scores, pairs


def expand_ranges(ranges: Ranges, rows: slice, eligible: Eligible) -> Tensor:
    """The keys of the slices of some rows, after `_clip`: int32 ``[B or 1, G or 1, T, S·P·L]``, -1 = none."""
    start, end = _bounds(ranges, rows, eligible)
    length = int((end - start).max()) if start.numel() else 0
    steps = torch.arange(max(length, 1), dtype=torch.int32, device=start.device)
    places = start[..., None] + steps
    inside = places < end[..., None]
    return torch.where(inside, _keys_at(ranges.order, torch.where(inside, places, 0)), -1).flatten(3)


def _bounds(ranges: Ranges, rows: slice, eligible: Eligible) -> tuple[Tensor, Tensor]:
    """Slices of some rows, ``[B or 1, G or 1, T, S, P]``, causal and within the limit.

    Within a slice keys come in increasing position, so the keys up to the query are a prefix of the slice, and the
    keys nearest to the query are around the end of that prefix.
    """
    positions = eligible.mask.positions[:, None, :, None, None]
    if ranges.start is None or ranges.end is None:
        order = ranges.order
        orders, length = (1, eligible.num_keys) if order is None else (order.shape[2], order.shape[3])
        start = torch.zeros((1, 1, positions.shape[2], orders, 1), dtype=torch.int32, device=positions.device)
        end = start + length
    else:
        pick = rows if ranges.start.shape[2] > 1 else slice(None)
        start, end = ranges.start[:, :, pick], ranges.end[:, :, pick]
    if not eligible.mask.causal and ranges.limit is None:
        return start, end
    split = _first_after(ranges.order, start, end, positions)
    start, end, split = torch.broadcast_tensors(start, end, split)
    if eligible.mask.causal:
        end = split
        return (start if ranges.limit is None else torch.maximum(start, end - ranges.limit)), end
    assert ranges.limit is not None
    start = torch.minimum(torch.maximum(split - ranges.limit // 2, start), torch.maximum(end - ranges.limit, start))
    return start, torch.minimum(start + ranges.limit, end)


def _first_after(order: Tensor | None, start: Tensor, end: Tensor, positions: Tensor) -> Tensor:
    """Place of the first key after ``positions`` in each slice, by binary search."""
    if order is None:
        return torch.minimum(torch.maximum(positions + 1, start), end)
    low, high, positions = torch.broadcast_tensors(start, end, positions)
    longest = int((end - start).max()) if start.numel() else 0
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        searching = low < high
        before = (_keys_at(order, torch.where(searching, middle, 0)) <= positions) & searching
        low = torch.where(before, middle + 1, low)
        high = torch.where(searching & ~before, middle, high)
    return low


def _keys_at(order: Tensor | None, places: Tensor) -> Tensor:
    """``order [B or 1, G or 1, S, L]`` at ``places [B or 1, G or 1, T, S, P, ...]``; int32."""
    if order is None:
        return places
    batch, heads, orders, length = order.shape
    if length == 0:
        return torch.full_like(places, -1)
    trailing = [1] * (places.dim() - 4)
    b = torch.arange(batch, device=order.device).view(-1, 1, 1, 1)
    g = torch.arange(heads, device=order.device).view(1, -1, 1, 1)
    s = torch.arange(orders, device=order.device).view(1, 1, 1, -1)
    first = ((b * heads + g) * orders + s) * length
    return order.flatten()[places + first.view(batch, heads, 1, orders, *trailing)]
