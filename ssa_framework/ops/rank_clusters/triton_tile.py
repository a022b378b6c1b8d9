"""How kernels that rank divide queries and clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Queries and clusters of a tile, and how a program runs: ``programs`` of them on a multiprocessor."""

    rows: int
    clusters: int
    warps: int
    programs: int


def tile_for(width: int) -> Tile:
    """As registers allow (255 a thread)."""
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(64, 32, 4, 1)


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def parts_of_queries(q: Tensor) -> int:
    return 1 if q.dtype == torch.bfloat16 else 2
