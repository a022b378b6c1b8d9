"""Means of keys that a causal hash may use: of the past of the same document only."""

from __future__ import annotations

import torch
from torch import Tensor


def center_keys(keys: Tensor, keep: Tensor | None, segments: Tensor | None, causal: bool) -> Tensor:
    """Subtract a mean from every key. Attention does not see a shift that all keys share, hashes do.

    Causal: key j loses the mean of the keys up to j of its document, so that no code depends on the future. Not
    causal: all keys of a document lose the document's mean. Sums are float64 and never cross a document, so the
    result does not depend on what else is packed beside it.

    Args:
        keys: float32 ``[B, Hkv, M, D]``, zeros where padded. keep: bool ``[B or 1, M]``. segments: int
        ``[B or 1, M]``.
    """
    batch, _, count, _ = keys.shape
    ones = torch.ones((1, count), dtype=torch.float64, device=keys.device)
    weight = ones if keep is None else keep.to(torch.float64)
    if segments is None:
        if causal:
            # on the CPU torch keeps the running sum of float32 in float64 by itself
            sums = keys.cumsum(2) if keys.device.type == "cpu" else keys.double().cumsum(2).float()
            counts = weight.cumsum(1).clamp(min=1)[:, None, :, None]
        else:
            sums = keys.sum(2, keepdim=True, dtype=torch.float64).float()
            counts = weight.sum(1).clamp(min=1)[:, None, None, None]
        return torch.addcdiv(keys, sums, counts.float(), value=-1)
    wide = keys.double()
    order = segments.expand(batch, -1).argsort(dim=1, stable=True)  # documents side by side, in their own order
    back = order.argsort(dim=1)
    ids = segments.expand(batch, -1).gather(1, order)
    sums = _segmented_cumsum(_take(wide, order), ids[:, None])
    counts = _segmented_cumsum(weight.expand(batch, -1).gather(1, order)[:, None, :, None], ids[:, None])
    mean = sums / counts.clamp(min=1)
    if not causal:
        final = torch.searchsorted(ids.contiguous(), ids.contiguous(), right=True) - 1  # last key of each document
        mean = _take(mean, final)
    return keys - _take(mean, back).float()


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]`` at ``index [B, M]`` along M."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _segmented_cumsum(x: Tensor, ids: Tensor) -> Tensor:
    """Running sums of ``x [B, X, M, D]`` that start anew wherever ``ids [B, 1, M]`` change (Hillis, Steele, 1986)."""
    count, step = x.shape[2], 1
    while step < count:
        same = (ids[..., step:] == ids[..., :-step])[..., None]
        x = torch.cat([x[:, :, :step], x[:, :, step:] + torch.where(same, x[:, :, :-step], 0.0)], dim=2)
        step *= 2
    return x
