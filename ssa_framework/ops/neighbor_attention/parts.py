"""The tensors that every implementation of the op gets: a neighbor graph taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssa_framework.ops.key_lists import among, expand_slices, mark

STRUCTURE = (
    "neighbors", "columns", "key_keep", "query_segments", "key_segments", "span_start", "span_end",
    "slice_order", "slice_start", "slice_end", "summary_log_weight", "summary_first", "summary_stop", "summary_opened",
)  # fmt: skip
"""The tensors of `GraphParts` that have no gradient, in the order in which the op takes them."""


@dataclass(frozen=True)
class GraphParts:
    """Disjoint parts of a graph, ready for kernels: arithmetic, intervals and index lists, no callables.

    The neighbors of a query are its span, the band, the columns, the slices and the list; a key that several of the
    first four reach belongs to the first of them, and lists hold none of theirs. All but lists, which are already
    cleaned, end at the query where ``causal``, and skip padding and other documents. Summaries are pseudo-keys beside
    them.

    Attributes:
        band_before, band_after: the band of each query, or -1, -1 for none.
        query_offset: the query of row i stands at position ``i + query_offset`` (lists and summaries do without).
        causal: no key after its query.
        columns: int32 ``[C]``, ascending.
        neighbors: int32 ``[B or 1, G or 1, N, K]``, -1 = empty, anywhere.
        bias: floating point ``[B or 1, H or 1, N, K]``, added to the scores of ``neighbors``; -inf = no edge.
        key_keep: bool ``[B or 1, M]``.
        query_segments, key_segments: int ``[B or 1, N]`` and ``[B or 1, M]``.
        span_start, span_end: int32 ``[B or 1, N]``: the keys from ``span_start`` to ``span_end - 1``.
        slice_order: int32 ``[B or 1, G or 1, L]``, an order of keys; a key may be in it several times.
        slice_start, slice_end: int32 ``[B or 1, G or 1, N, P]``: the keys ``slice_order[start:end]``; no two slices of
            a query hold the same key.
        summary_k, summary_v: ``[B, Hkv, C, D]`` and ``[B, Hkv, C, Dv]``, pseudo-keys and pseudo-values, float32 (or
            float64 with float64 keys).
        summary_log_weight: like them ``[B, Hkv, C]``, added to the scores; -inf = not attended.
        summary_first, summary_stop: int32 ``[B or 1, N, R]``: a query attends, for each of R levels, the summaries
            from ``summary_first`` to ``summary_stop - 1``; levels do not overlap
        summary_opened: int32 ``[B or 1, G or 1, N, P]``: except for these; -1 = none.
        positions: int32 ``[B or 1, N]``: those of ``query_offset``, where they are in memory anyway.
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
    span_start: Tensor | None = None
    span_end: Tensor | None = None
    slice_order: Tensor | None = None
    slice_start: Tensor | None = None
    slice_end: Tensor | None = None
    summary_k: Tensor | None = None
    summary_v: Tensor | None = None
    summary_log_weight: Tensor | None = None
    summary_first: Tensor | None = None
    summary_stop: Tensor | None = None
    summary_opened: Tensor | None = None
    positions: Tensor | None = None

    @property
    def structure(self) -> tuple[list[Tensor], int]:
        """The tensors of `STRUCTURE` that are there, and which they are, a bit for each place."""
        present = [place for place, name in enumerate(STRUCTURE) if getattr(self, name) is not None]
        return [getattr(self, STRUCTURE[place]) for place in present], sum(1 << place for place in present)

    @classmethod
    def of_structure(
        cls,
        structure: Sequence[Tensor],
        present: int,
        bias: Tensor | None,
        summaries: tuple[Tensor | None, Tensor | None],
        band: Sequence[int],
        query_offset: int,
        causal: bool,
    ) -> GraphParts:
        """The inverse of `structure`."""
        names = [name for place, name in enumerate(STRUCTURE) if present >> place & 1]
        tensors = dict(zip(names, structure, strict=True))
        return cls(
            band_before=band[0],
            band_after=band[1],
            query_offset=query_offset,
            causal=causal,
            bias=bias,
            summary_k=summaries[0],
            summary_v=summaries[1],
            **tensors,
        )

    @property
    def has_lists_only(self) -> bool:
        """Whether there is neither a span, nor slices, nor summaries."""
        return self.span_start is None and self.slice_start is None and self.summary_k is None

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

    def span_tile(self, rows: slice, num_keys: int) -> tuple[int, int]:
        """First and one past the last key that the span of some query in ``rows`` reaches."""
        if self.span_start is None or self.span_end is None or rows.stop <= rows.start:
            return 0, 0
        start, end = self.span_start[:, rows], self.span_end[:, rows]
        some = end > start
        low = int(torch.where(some, start, num_keys).min())
        return low, max(low, int(torch.where(some, end, 0).max()))

    def span_allowed(self, positions: Tensor, rows: slice, keys: Tensor) -> Tensor:
        """bool ``[B or 1, N, C]`` for ``positions`` ``[N]`` of ``rows`` and ``keys`` ``[C]``: in the span, causal."""
        if self.span_start is None or self.span_end is None:
            return torch.zeros((1, positions.numel(), keys.numel()), dtype=torch.bool, device=keys.device)
        inside = (keys >= self.span_start[:, rows, None]) & (keys < self.span_end[:, rows, None])
        return inside & (keys <= positions[:, None]) if self.causal else inside

    def band_allowed(self, positions: Tensor, rows: slice, keys: Tensor) -> Tensor:
        """bool ``[B or 1, N, C]``: in the band, causal, and not in the span."""
        allowed = self._in_band(positions, keys)
        if self.span_start is None:
            return allowed[None]
        return allowed & ~self.span_allowed(positions, rows, keys)

    def columns_allowed(self, positions: Tensor, rows: slice, keys: Tensor) -> Tensor:
        """bool ``[B or 1, N, C]``: causal, and neither in the band nor in the span."""
        allowed = torch.ones((positions.numel(), keys.numel()), dtype=torch.bool, device=keys.device)
        if self.causal:
            allowed &= keys[None, :] <= positions[:, None]
        if self.has_band:
            allowed &= ~self._in_band(positions, keys)
        if self.span_start is None:
            return allowed[None]
        return allowed & ~self.span_allowed(positions, rows, keys)

    def _in_band(self, positions: Tensor, keys: Tensor) -> Tensor:
        distance = keys[None, :] - positions[:, None]
        after = 0 if self.causal else self.band_after
        return (distance >= -self.band_before) & (distance <= after)

    def restrict(self, allowed: Tensor, rows: slice, keys: Tensor) -> Tensor:
        """``allowed`` ``[B or 1, N, C]`` → ``[B or 1, 1, N, C]`` with padding and documents."""
        if self.key_keep is not None:
            allowed = allowed & self.key_keep[:, None, keys]
        if self.query_segments is not None and self.key_segments is not None:
            allowed = allowed & (self.query_segments[:, rows, None] == self.key_segments[:, None, keys])
        return allowed[:, None]

    def slice_keys(self, positions: Tensor, rows: slice, num_keys: int) -> Tensor | None:
        """The slices of ``rows`` as lists, int32 ``[B or 1, G or 1, N, K]``: what no other part has; -1 = empty."""
        if self.slice_order is None or self.slice_start is None or self.slice_end is None:
            return None
        keys = expand_slices(self.slice_order, self.slice_start[:, :, rows], self.slice_end[:, :, rows])
        allowed, places = keys >= 0, positions[:, None]
        if self.causal:
            allowed = allowed & (keys <= places)
        if self.has_band:
            after = 0 if self.causal else self.band_after
            allowed = allowed & ~((keys >= places - self.band_before) & (keys <= places + after))
        if self.span_start is not None and self.span_end is not None:
            start, end = (x[:, None, rows, None] for x in (self.span_start, self.span_end))
            allowed = allowed & ~((keys >= start) & (keys < end))
        if self.columns is not None:
            allowed = allowed & ~among(keys.clamp(min=0), self.columns, num_keys)
        if self.key_keep is not None:
            allowed = allowed & look_up(self.key_keep, keys.clamp(min=0))
        if self.query_segments is not None and self.key_segments is not None:
            theirs = look_up(self.key_segments, keys.clamp(min=0))
            allowed = allowed & (theirs == self.query_segments[:, None, rows, None])
        return torch.where(allowed, keys, -1)

    def summaries_allowed(self, rows: slice) -> Tensor | None:
        """bool ``[B or 1, G or 1, N, C]``: seen, and not opened."""
        if self.summary_log_weight is None or self.summary_first is None or self.summary_stop is None:
            return None
        count = self.summary_log_weight.shape[2]
        number = torch.arange(count, dtype=torch.int32, device=self.summary_log_weight.device)
        first, stop = (x[:, None, rows, None] for x in (self.summary_first, self.summary_stop))
        seen = ((number[:, None] >= first) & (number[:, None] < stop)).any(-1)
        if self.summary_opened is None:
            return seen
        return seen & ~mark(self.summary_opened[:, :, rows], count)

    def batch_element(self, batch: slice) -> GraphParts:
        """The parts of some batch elements; a view."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x[batch] if x is not None and x.shape[0] > 1 else x

        names = [name for name in (*STRUCTURE, "bias", "summary_k", "summary_v") if name != "columns"]
        picked: dict[str, Any] = {name: pick(getattr(self, name)) for name in names}
        return replace(self, **picked)


def look_up(table: Tensor, keys: Tensor) -> Tensor:
    """``table [B or 1, M]`` at ``keys [B or 1, X, N, C]``."""
    batch = max(table.shape[0], keys.shape[0])
    picked = table.expand(batch, -1).gather(1, keys.long().expand(batch, -1, -1, -1).flatten(1))
    return picked.view(batch, *keys.shape[1:])
