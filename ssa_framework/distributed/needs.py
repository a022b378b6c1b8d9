"""Which keys the rows of a graph reach, and the graph over those keys alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask
from ssa_framework.proposals import Ranges, Spans

_MARKED_AT_ONCE = 2**24


def reached_keys(graph: NeighborGraph, kv_heads: int) -> Tensor:
    """Keys that a span, a column, a slice or the list of some query reaches, bool ``[B or 1, Hkv or 1, M]``; masks and
    the band are not looked at."""
    keys = graph.num_keys
    reached = torch.zeros((1, 1, keys), dtype=torch.bool, device=graph.device)
    if graph.columns is not None:
        reached = reached.index_fill(2, graph.columns.long(), True)
    if graph.spans is not None:
        start, end = (x[:, None, :, None] for x in (graph.spans.start, graph.spans.end))
        reached = reached | covered(start, end, keys)
    if graph.slices is not None and graph.slices.start is not None and graph.slices.end is not None:
        assert graph.slices.order is not None
        order = graph.slices.order[:, :, 0]  # [B or 1, G or 1, L]
        places = covered(graph.slices.start[:, :, :, 0], graph.slices.end[:, :, :, 0], order.shape[2])
        shape = torch.broadcast_shapes(places.shape, order.shape)
        reached = reached | _marked(torch.where(places, order, -1).expand(shape), keys)
    if graph.neighbors is not None:
        reached = reached | _marked(graph.neighbors.flatten(2), keys)
    if reached.shape[1] > kv_heads:
        reached = reached.unflatten(1, (kv_heads, -1)).any(2)
    return reached


def covered(start: Tensor, end: Tensor, places: int) -> Tensor:
    """Places inside some interval ``[start, end)``: int32 ``[X, Y, N, P]`` → bool ``[X, Y, places]``."""
    steps = torch.zeros((*start.shape[:2], places + 1), dtype=torch.int32, device=start.device)
    steps.scatter_(2, start.flatten(2).long(), 1, reduce="add")
    steps.scatter_(2, torch.maximum(start, end).flatten(2).long(), -1, reduce="add")
    return steps.cumsum(2, dtype=torch.int32)[..., :places] > 0


def _marked(keys: Tensor, num_keys: int) -> Tensor:
    """Which keys are in a list: int32 ``[X, Y, E]``, -1 = empty → bool ``[X, Y, M]``."""
    out = torch.zeros((*keys.shape[:2], num_keys + 1), dtype=torch.bool, device=keys.device)
    step = max(1, _MARKED_AT_ONCE // max(1, keys.shape[0] * keys.shape[1]))
    for some in keys.split(step, dim=2):
        out.scatter_(2, torch.where(some < 0, num_keys, some).long(), True)
    return out[..., :num_keys]


@dataclass(frozen=True)
class KeyTable:
    """Some of the keys of a sequence, in their order, as the keys of a shorter sequence.

    All heads and batch elements share one table, so that positions remain positions: what one of them does not need
    is an unused row.

    Attributes:
        used: int64 ``[U]``, the keys, ascending.
        before: int32 ``[M + 1]``, how many of them stand before each position.
    """

    used: Tensor
    before: Tensor

    @classmethod
    def of(cls, before: Tensor, count: int) -> KeyTable:
        """From what `counted_before` gives, and its last number."""
        return cls(true_places(before[1:], count), before)

    def __len__(self) -> int:
        return self.used.numel()

    @cached_property
    def _rows(self) -> Tensor:
        """int32 ``[M + 1]``: the row of each key, and at the end, which is place -1, a -1."""
        rows = self.before.clamp(max=max(0, len(self) - 1))
        rows[-1] = -1
        return rows

    def places(self, keys: Tensor) -> Tensor:
        """Rows of the table for keys that are in it; -1 stays -1, and what is not in it gets any row."""
        return self._rows[keys.long()]

    def mask(self, mask: EdgeMask) -> EdgeMask:
        """``mask`` over the keys of the table; positions stay what they are."""
        mask_mod = mask.mask_mod
        return replace(
            mask,
            key_keep=None if mask.key_keep is None else mask.key_keep[:, self.used],
            key_segments=None if mask.key_segments is None else mask.key_segments[:, self.used],
            mask_mod=None if mask_mod is None else lambda b, h, row, key: mask_mod(b, h, row, self.used[key]),
        )

    def graph(self, graph: NeighborGraph) -> NeighborGraph:
        """``graph`` over the keys of the table."""
        spans, slices = graph.spans, graph.slices
        if spans is not None:
            spans = Spans(self.before[spans.start.long()], self.before[spans.end.long()])
        if slices is not None:
            assert slices.order is not None
            slices = Ranges(self.places(slices.order), slices.start, slices.end, slices.attend)
        return replace(
            graph,
            num_keys=len(self),
            mask=self.mask(graph.mask),
            columns=None if graph.columns is None else self.places(graph.columns),
            neighbors=None if graph.neighbors is None else self.places(graph.neighbors),
            spans=spans,
            slices=slices,
        )


def counted_before(mask: Tensor) -> Tensor:
    """How many elements of bool ``[M]`` are true before each place, int32 ``[M + 1]``."""
    return torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))


def true_places(counted: Tensor, count: int) -> Tensor:
    """Numbers of the true elements of a mask, int64 ``[count]``: unlike ``nonzero`` this does not wait for the device.

    Args:
        counted: int32 ``[n]``, how many elements are true up to each of them. count: how many are in all.
    """
    return torch.searchsorted(counted, torch.arange(1, count + 1, dtype=torch.int32, device=counted.device))
