"""Small operations on padded key lists: int32 ``[..., C]``, ``-1`` = empty."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.proposals import Band, Spans


def cat_keys(parts: list[Tensor]) -> Tensor:
    """Concatenate ``[B or 1, G or 1, N, C]`` key lists along C, broadcasting the rest."""
    lead = torch.broadcast_shapes(*[p.shape[:-1] for p in parts])
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], dim=-1)


def in_band(keys: Tensor, positions: Tensor, band: Band) -> Tensor:
    """Whether ``keys`` ``[B or 1, X, N, C]`` lie in the band of queries at ``positions`` ``[B or 1, N]``."""
    distance = keys - positions[:, None, :, None]
    return (distance >= -band.before) & (distance <= band.after)


def in_span(keys: Tensor, spans: Spans) -> Tensor:
    """Whether ``keys`` ``[B or 1, X, N, C]`` lie in the span of their query."""
    return (keys >= spans.start[:, None, :, None]) & (keys < spans.end[:, None, :, None])


def among(keys: Tensor, columns: Tensor, num_keys: int) -> Tensor:
    """Whether each of ``keys`` (>= 0) is one of ``columns``, by a table of all keys."""
    table = torch.zeros(num_keys, dtype=torch.bool, device=keys.device)
    table[columns.long()] = True
    return table[keys.long()]


def expand_slices(order: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """``order [B or 1, G or Hkv or 1, L]`` and slices ``[B or 1, G or 1, N, P]`` → their keys, int32
    ``[B or 1, G or 1, N, K]``, slice by slice, -1 = empty at the end."""
    if 1 < order.shape[1] < start.shape[1]:
        order = order.repeat_interleave(start.shape[1] // order.shape[1], dim=1)
    sizes = (end - start).clamp(min=0).long()
    ends = sizes.cumsum(-1)
    total = ends[..., -1:] if ends.shape[-1] else ends.new_zeros((*ends.shape[:-1], 1))
    width = int(total.max()) if total.numel() else 0
    if not width:
        return order.new_full((*total.shape[:-1], 0), -1)
    slot = torch.arange(width, device=order.device).expand(*total.shape[:-1], -1).contiguous()
    which = torch.searchsorted(ends, slot, right=True).clamp(max=ends.shape[-1] - 1)
    place = start.long().gather(-1, which) + slot - (ends - sizes).gather(-1, which)
    batch, heads = max(order.shape[0], start.shape[0]), max(order.shape[1], start.shape[1])
    inside = slot < total
    place = torch.where(inside, place, 0).expand(batch, heads, -1, -1)
    keys = order.expand(batch, heads, -1).gather(2, place.flatten(2)).view(place.shape)
    return torch.where(inside, keys, -1)


def mark(numbers: Tensor, count: int) -> Tensor:
    """``numbers [..., P]`` below ``count``, -1 = none → bool ``[..., count]``, True where one of them is."""
    padded = torch.zeros((*numbers.shape[:-1], count + 1), dtype=torch.bool, device=numbers.device)
    padded.scatter_(-1, torch.where(numbers < 0, count, numbers).long(), True)
    return padded[..., :count]


def sort_unique(keys: Tensor) -> Tensor:
    """Each row ascending, each key once, ``-1`` at the end; int32 ``[..., C]``."""
    last = torch.iinfo(torch.int32).max
    ordered = torch.where(keys < 0, last, keys).sort(dim=-1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = torch.where(repeated, last, ordered).sort(dim=-1).values
    return torch.where(ordered == last, -1, ordered)


def jaccard(a: Tensor, b: Tensor, a_valid: Tensor, b_valid: Tensor) -> Tensor:
    """Jaccard similarity of two key lists per row, ``[..., Ka]`` and ``[..., Kb]`` → float32 ``[...]``.

    Keys may be in any order but not twice in a row; two empty rows are equal (1).
    """
    last = torch.iinfo(torch.int32).max
    both = torch.cat([torch.where(a_valid, a, last), torch.where(b_valid, b, last)], dim=-1).sort(dim=-1).values
    shared = ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] != last)).sum(-1)
    union = a_valid.sum(-1) + b_valid.sum(-1) - shared
    return torch.where(union == 0, 1.0, shared / union.clamp(min=1)).to(torch.float32)
