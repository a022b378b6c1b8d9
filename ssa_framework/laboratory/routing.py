"""A source mix at work on some queries of a layer: the graph that it chose, and which source proposed which key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.laboratory.capture import LayerTensors
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.key_lists import in_band, in_span, mark
from ssa_framework.ops.select_neighbors.api import Eligible
from ssa_framework.ops.select_neighbors.torch_gather import expand_ranges
from ssa_framework.proposals import Band, Candidates, Columns, Proposal, Ranges, Spans, Summaries
from ssa_framework.quality.rows import in_fixed_part
from ssa_framework.quality.sample import sample_rows
from ssa_framework.registry import SourceRegistry
from ssa_framework.router import Router


def sample_queries(layer: LayerTensors, queries: int, *, first_query: int = 0, seed: int = 0) -> Tensor:
    """Positions of a seeded sample, one from each of ``queries`` equal stretches behind ``first_query``; int64,
    ascending.

    Raises:
        ConfigError: fewer than one query, or none behind ``first_query``.
    """
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise ConfigError(f"queries must be an integer >= 1, got {queries!r}")
    if isinstance(first_query, bool) or not isinstance(first_query, int) or not 0 <= first_query < layer.length:
        raise ConfigError(f"first_query must lie in [0, {layer.length}), the length, got {first_query!r}")
    return first_query + sample_rows(layer.length - first_query, queries, seed, layer.q.device)


class MixRouter:
    """Routes queries of layers with one configuration, as `use_sparse_attention` would, but never falls back to dense
    attention: what is looked at is the routing.

    Args:
        config: source mix, budget, graph heads, seed; sizes and causality are those of the layers. Its ``layers`` are
            honoured: in one that is dense, every allowed key is a neighbor.
        registry: where source names are looked up; the default registry if left out.
    """

    def __init__(self, config: SSAConfig, registry: SourceRegistry | None = None) -> None:
        self.config = config
        self.registry = registry
        self._routers: dict[tuple[Any, ...], _RecordingRouter] = {}

    def prepare(self, layer: LayerTensors) -> _RecordingRouter:
        """The router for the sizes of this layer; made once, from the seed.

        Raises:
            ConfigError: a source with parameters of its own. SSAError: whatever the sources raise.
        """
        heads, kv_heads, dim = layer.q.shape[1], layer.k.shape[1], layer.q.shape[3]
        own = layer.layer if layer.layer in (self.config.layers or ()) else None
        key = (own, heads, kv_heads, dim, layer.causal, layer.q.device)
        if key not in self._routers:
            config = routing_config(self.config, layer)
            router = _RecordingRouter(config, registry=self.registry).to(layer.q.device).eval()
            if any(parameter.requires_grad for parameter in router.parameters()):
                raise ConfigError("a source of this mix has parameters of its own, which are not trained here")
            self._routers[key] = router
        return self._routers[key]

    @torch.no_grad()
    def route(self, layer: LayerTensors, rows: Tensor) -> RoutedQueries:
        """Choose the neighbors of the queries at positions ``rows [T]`` among all keys of the layer.

        Raises:
            SSAError: whatever the sources and the router raise.
        """
        router = self.prepare(layer)
        mask = make_edge_mask(
            batch=layer.q.shape[0],
            heads=layer.q.shape[1],
            queries=len(rows),
            keys=layer.length,
            device=layer.q.device,
            causal=layer.causal,
            query_positions=rows,
        )
        router.recorded = ()
        graph: NeighborGraph = router(layer.q[:, :, rows], layer.k, mask)
        if graph.band is not None and not router.recorded:  # a dense layer asks no source
            return RoutedQueries(graph, ((next(iter(graph.sources)), graph.band),))
        return RoutedQueries(graph, tuple(router.recorded))


def routing_config(config: SSAConfig, layer: LayerTensors) -> SSAConfig:
    """The configuration of a layer with its sizes and its causality, and without dense fallback unless it is dense."""
    heads, kv_heads, dim = layer.q.shape[1], layer.k.shape[1], layer.q.shape[3]
    config = config.for_layer(layer.layer)
    return config.replace(
        d_model=heads * dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        causal=layer.causal,
        dropout=0.0,
        rope_base=None,
        dense_below=config.dense_below if config.is_dense else 0,
    )


class _RecordingRouter(Router):
    """A router that keeps what its sources proposed in the last call."""

    recorded: Sequence[tuple[str, Proposal]] = ()

    def _collect(self, *args: Any, **kwargs: Any) -> list[tuple[str, Proposal]]:
        collected = super()._collect(*args, **kwargs)
        self.recorded = collected
        return collected


@dataclass(frozen=True)
class Membership:
    """Where one source stands, for a chunk of T queries; E slots of `NeighborGraph.edge_keys`, H query heads.

    Attributes:
        proposed: of the neighbors, bool ``[B, H, T, E]``.
        credited: of the neighbors, those that count for this source: each counts for the first source that proposed
            it, bands and columns before lists; bool ``[B, H, T, E]``.
        keys: how many distinct allowed keys it proposed, neighbors or not, int64 ``[B, H, T]``.
        scored: how many keys the router scored for it, int64 ``[B, H, T]``.
    """

    proposed: Tensor
    credited: Tensor
    keys: Tensor
    scored: Tensor


@dataclass(frozen=True)
class RoutedQueries:
    """What a mix chose.

    Attributes:
        graph: of the queries that were routed.
        proposals: what the sources proposed for them, with their names, in the order of the mix.
    """

    graph: NeighborGraph
    proposals: tuple[tuple[str, Proposal], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.graph.sources)

    def membership(self, piece: NeighborGraph, rows: Tensor, keys: Tensor) -> dict[str, Membership]:
        """Who proposed the neighbors of some of the queries.

        Args:
            piece: the graph of the queries ``rows [T]`` of `graph`.
            keys: their neighbors, integer ``[B, H, T, E]``; -1 = none.
        """
        graph_heads, heads = piece.graph_heads, piece.num_heads
        every_key = torch.arange(piece.num_keys, dtype=torch.int32, device=piece.device)
        every_key = every_key.expand(1, 1, len(rows), -1)
        allowed = piece.mask.structural(every_key)
        listable = allowed & ~in_fixed_part(every_key, piece)
        neighbor, place = keys >= 0, keys.clamp(min=0).long()
        shape = (piece.batch, graph_heads, len(rows), piece.num_keys)
        union = {name: torch.zeros((), dtype=torch.bool, device=piece.device) for name in self.sources}
        credited = {name: torch.zeros_like(neighbor) for name in self.sources}
        scored = {name: torch.zeros(shape[:3], dtype=torch.int64, device=piece.device) for name in self.sources}
        unclaimed = neighbor
        for name, proposal in sorted(self.proposals, key=lambda named: self._rank(named[1])):
            if isinstance(proposal, Summaries):
                continue
            members = _proposed(proposal, piece, rows) & allowed  # [B or 1, G or 1, T, M]
            union[name] = union[name] | members
            mine = _per_head(members.expand(shape), heads).gather(-1, place) & unclaimed
            credited[name] = credited[name] | mine
            unclaimed = unclaimed & ~mine
            if _competes(proposal):
                scored[name] = scored[name] + (members & listable).sum(-1)
        return {
            name: Membership(
                proposed=_per_head(union[name].expand(shape), heads).gather(-1, place) & neighbor,
                credited=credited[name],
                keys=_per_head(union[name].expand(shape).sum(-1), heads),
                scored=_per_head(scored[name], heads),
            )
            for name in self.sources
        }

    def _rank(self, proposal: Proposal) -> int:
        """Which kind of proposal gets the credit for an edge that several made, the lowest first."""
        if isinstance(proposal, Spans) and self.graph.spans is not None:
            return 0
        if isinstance(proposal, Band | Columns):
            return 1 if isinstance(proposal, Band) else 2
        if isinstance(proposal, Spans) or (isinstance(proposal, Ranges) and proposal.attend == "all"):
            return 3
        return 5 if _competes(proposal) else 4


def _competes(proposal: Proposal) -> bool:
    """Whether its keys are chosen by score."""
    if isinstance(proposal, Candidates):
        return not proposal.guaranteed
    return isinstance(proposal, Ranges) and proposal.attend == "topk"


def _per_head(x: Tensor, heads: int) -> Tensor:
    """``[B, G, ...]`` → ``[B, H, ...]``."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] < heads else x


def _proposed(proposal: Proposal, piece: NeighborGraph, rows: Tensor) -> Tensor:
    """Which keys a proposal holds for the queries ``rows``, masks not applied: bool ``[B or 1, G or 1, T, M]``."""
    every_key = torch.arange(piece.num_keys, dtype=torch.int32, device=piece.device)
    every_key = every_key.expand(1, 1, len(rows), -1)
    if isinstance(proposal, Band):
        return in_band(every_key, piece.mask.positions, proposal)
    if isinstance(proposal, Columns):
        return torch.isin(every_key, torch.as_tensor(proposal.positions, dtype=torch.int32, device=piece.device))
    if isinstance(proposal, Spans):
        return in_span(every_key, Spans(proposal.start[:, rows], proposal.end[:, rows]))
    if isinstance(proposal, Candidates):
        indices = proposal.indices[:, :, rows] if proposal.indices.shape[2] > 1 else proposal.indices
        return mark(indices, piece.num_keys)
    assert isinstance(proposal, Ranges)
    if proposal.is_everything:
        return torch.ones_like(every_key, dtype=torch.bool)
    found = torch.zeros((), dtype=torch.bool, device=piece.device)
    for order in _single_orders(proposal, rows, piece.graph_heads):
        eligible = Eligible(piece.mask, piece.num_heads, piece.num_keys, None, None)
        found = found | mark(expand_ranges(order, slice(None), eligible), piece.num_keys)
    return found


def _single_orders(ranges: Ranges, rows: Tensor, graph_heads: int) -> Iterator[Ranges]:
    """The slices of each order, for some rows, one order at a time: fewer keys to expand at once."""
    orders = 1 if ranges.order is None else ranges.order.shape[2]
    start, end = ranges.start, ranges.end
    if start is not None and end is not None and start.shape[2] > 1:
        start, end = start[:, :, rows], end[:, :, rows]
    for number in range(orders):
        one = slice(number, number + 1)
        order = ranges.order
        if order is not None:
            order = order[:, :, one]
            if 1 < order.shape[1] < graph_heads:
                order = order.repeat_interleave(graph_heads // order.shape[1], dim=1)
        if start is None or end is None:
            yield replace(ranges, order=order)
        else:
            yield replace(ranges, order=order, start=start[:, :, :, one], end=end[:, :, :, one])
