"""Rotary position embedding (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate pairs of features by their position.

    Args:
        x: ``[B, H, N, D]``, D even; feature ``j`` is paired with ``j + D/2``.
        positions: ``[N]`` or ``[B or 1, N]``.
        base: wavelengths grow from ``2π`` to ``2π · base`` positions.

    Returns: same shape and dtype as ``x``; the angles are computed in float32 or wider.
    """
    half = x.shape[-1] // 2
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = base ** (-torch.arange(half, dtype=compute, device=x.device) / half)
    if positions.dim() == 1:
        positions = positions[None]
    angles = positions[:, None, :, None].to(compute) * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half].to(compute), x[..., half:].to(compute)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
