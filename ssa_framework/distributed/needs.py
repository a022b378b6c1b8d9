"""Which keys the rows of a graph reach, and the graph over those keys alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    some = (end > start).flatten(2).int()
    steps.scatter_add_(2, start.flatten(2).long(), some)
    steps.scatter_add_(2, end.flatten(2).long(), -some)
    return steps.cumsum(2)[..., :places] > 0


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
    def of(cls, used: Tensor) -> KeyTable:
        """From a mask, bool ``[M]``."""
        return cls(used.nonzero()[:, 0], torch.nn.functional.pad(used.int().cumsum(0), (1, 0)).int())

    def __len__(self) -> int:
        return self.used.numel()

    def places(self, keys: Tensor) -> Tensor:
        """Rows of the table for keys that are in it; -1 stays -1, and what is not in it gets any row."""
        rows = self.before[keys.clamp(min=0).long()].clamp(max=max(0, len(self) - 1))
        return torch.where(keys < 0, -1, rows)

    def graph(self, graph: NeighborGraph, mask: EdgeMask) -> NeighborGraph:
        """``graph`` over the keys of the table; ``mask``: that of its rows, over these keys."""
        spans, slices = graph.spans, graph.slices
        if spans is not None:
            spans = Spans(self.before[spans.start.long()], self.before[spans.end.long()])
        if slices is not None:
            assert slices.order is not None
            slices = Ranges(self.places(slices.order), slices.start, slices.end, slices.attend)
        return replace(
            graph,
            num_keys=len(self),
            mask=mask,
            columns=None if graph.columns is None else self.places(graph.columns),
            neighbors=None if graph.neighbors is None else self.places(graph.neighbors),
            spans=spans,
            slices=slices,
        )
