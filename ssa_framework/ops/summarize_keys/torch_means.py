"""Plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def means(x: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]``, ``members [B or 1, Hkv or 1, R, M]``, ``sizes [B or 1, Hkv or 1, C]`` →
    ``[B, Hkv, C, D]`` in float32 or float64."""
    batch, heads, _, dim = x.shape
    count = sizes.shape[2]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(compute).reshape(-1, dim)
    sums = torch.zeros((batch * heads * (count + 1), dim), dtype=compute, device=x.device)
    for level in members.unbind(2):
        sums.index_add_(0, _owners(level, batch, heads, count), rows)
    sums = sums.view(batch, heads, count + 1, dim)[:, :, :count]
    return sums / sizes.clamp(min=1)[..., None]


def spread(grad: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """Gradient of `means`: ``grad [B, Hkv, C, D]`` → ``[B, Hkv, M, D]``."""
    batch, heads, count, dim = grad.shape
    share = grad / sizes.clamp(min=1).to(grad.dtype)[..., None]
    padded = torch.cat([share, share.new_zeros((batch, heads, 1, dim))], dim=2).view(-1, dim)
    out = grad.new_zeros((batch * heads * members.shape[3], dim))
    for level in members.unbind(2):
        out += padded.index_select(0, _owners(level, batch, heads, count))
    return out.view(batch, heads, -1, dim)


def _owners(level: Tensor, batch: int, heads: int, count: int) -> Tensor:
    """Rows of ``[B · Hkv · (C + 1), D]`` that the keys belong to; the last one of a head takes those of none."""
    owner = torch.where(level < 0, count, level).expand(batch, heads, -1).long()
    first = torch.arange(batch * heads, device=level.device).view(batch, heads, 1) * (count + 1)
    return (first + owner).flatten()
