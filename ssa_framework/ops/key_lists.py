"""Small operations on padded key lists: int32 ``[..., C]``, ``-1`` = empty."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.proposals import Band


def cat_keys(parts: list[Tensor]) -> Tensor:
    """Concatenate ``[B or 1, G or 1, N, C]`` key lists along C, broadcasting the rest."""
    lead = torch.broadcast_shapes(*[p.shape[:-1] for p in parts])
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], dim=-1)


def in_band(keys: Tensor, positions: Tensor, band: Band) -> Tensor:
    """Whether ``keys`` ``[B or 1, X, N, C]`` lie in the band of queries at ``positions`` ``[B or 1, N]``."""
    distance = keys - positions[:, None, :, None]
    return (distance >= -band.before) & (distance <= band.after)


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
