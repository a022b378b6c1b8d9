"""Smallest and largest of each, and a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssa_framework.proposals import Bounds


def any_outside(bounds: Sequence[Bounds], device: torch.device) -> Tensor:
    """See `ssa_framework.ops.index_bounds.api.any_outside`."""
    outside = torch.zeros((), dtype=torch.bool, device=device)
    for first, last, low, high in bounds:
        if first.numel() and last.numel():
            outside = outside | (first < low).any() | (last > high).any() | (first > last).any()
    return outside
