"""What `rank_clusters` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OpenedClusters:
    """The clusters that queries open, best first, and where their keys are.

    Attributes:
        numbers: int32 ``[B, G, N, most]``, numbers of slots, -1 = none.
        start, end: int32 ``[B, G, N, most]``, the slices of the order of the keys that hold them; 0 and 0 = none.
    """

    numbers: Tensor
    start: Tensor
    end: Tensor
