"""The tensors that every implementation of the op gets: a neighbor graph taken apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class GraphParts:
    """Disjoint parts of a graph, ready for kernels: arithmetic and index lists, no callables.

    Attributes:
        band_before, band_after: the band of each query, or -1, -1 for none.
        query_offset: the query of row i stands at position ``i + query_offset`` (used by band and columns only).
        causal: band and columns end at the query (lists are already cleaned).
        columns: int32 ``[C]``, ascending; keys inside the band belong to the band.
        neighbors: int32 ``[B or 1, G or 1, N, K]``, -1 = empty, anywhere.
        bias: floating point ``[B or 1, H or 1, N, K]``, added to the scores of ``neighbors``; -inf = no edge.
        key_keep: bool ``[B or 1, M]``, for band and columns.
        query_segments, key_segments: int ``[B or 1, N]`` and ``[B or 1, M]``, for band and columns.
    """

    band_before: int = -1
    band_after: int = -1
    query_offset: int = 0
    causal: bool = False
    columns: Tensor | None = None
    neighbors: Tensor | None = None
    bias: Tensor | None = None
    key_keep: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None

    @property
    def has_band(self) -> bool:
        return self.band_before >= 0

    def tile(self, rows: slice, num_keys: int) -> tuple[int, int]:
        """First and one past the last key that the band of some query in ``rows`` reaches."""
        if not self.has_band:
            return 0, 0
        after = 0 if self.causal else self.band_after
        low = min(max(self.query_offset + rows.start - self.band_before, 0), num_keys)
        high = min(max(self.query_offset + rows.stop + after, low), num_keys)
        return low, high

    def band_allowed(self, positions: Tensor, keys: Tensor) -> Tensor:
        """bool ``[N, C]`` for ``positions`` ``[N]`` and ``keys`` ``[C]``: in the band and causal."""
        distance = keys[None, :] - positions[:, None]
        after = 0 if self.causal else self.band_after
        return (distance >= -self.band_before) & (distance <= after)

    def columns_allowed(self, positions: Tensor, keys: Tensor) -> Tensor:
        """bool ``[N, C]``: causal, and not in the band."""
        allowed = torch.ones((positions.numel(), keys.numel()), dtype=torch.bool, device=keys.device)
        if self.causal:
            allowed &= keys[None, :] <= positions[:, None]
        if self.has_band:
            allowed &= ~self.band_allowed(positions, keys)
        return allowed

    def restrict(self, allowed: Tensor, rows: slice, keys: Tensor) -> Tensor:
        """``allowed`` ``[N, C]`` → ``[B or 1, 1, N, C]`` with padding and documents."""
        allowed = allowed[None, None]
        if self.key_keep is not None:
            allowed = allowed & self.key_keep[:, None, None, keys]
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, rows, None] == self.key_segments[:, None, keys]
            allowed = allowed & same[:, None]
        return allowed

    def batch_element(self, batch: slice) -> GraphParts:
        """The parts of some batch elements; a view."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x[batch] if x is not None and x.shape[0] > 1 else x

        return replace(
            self,
            neighbors=pick(self.neighbors),
            bias=pick(self.bias),
            key_keep=pick(self.key_keep),
            query_segments=pick(self.query_segments),
            key_segments=pick(self.key_segments),
        )
