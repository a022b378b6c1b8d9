"""`Router`: asks the sources, and makes one neighbor graph of what they propose."""

from __future__ import annotations

import itertools
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssa_framework.audit import AuditReport, audit_graph
from ssa_framework.cache import IndexStates
from ssa_framework.config import SSAConfig
from ssa_framework.crossover import faster_dense
from ssa_framework.errors import BudgetWarning, ConfigError, GraphError, ProposalError
from ssa_framework.graph import NeighborGraph, SourceRecord
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.index_bounds import any_outside
from ssa_framework.ops.select_neighbors import Proposed, Selection, select_neighbors
from ssa_framework.ops.select_neighbors.api import Eligible
from ssa_framework.proposals import (
    Band,
    Bounds,
    Candidates,
    Columns,
    Proposal,
    Ranges,
    Spans,
    Summaries,
    require,
    unite_columns,
    validate_proposals,
)
from ssa_framework.registry import SourceRegistry, default_registry
from ssa_framework.source import LayerSpec, NeighborSource, RoutingContext, SpreadSegments, create_source
from ssa_framework.summaries import clean_summaries

DENSE_BELOW_IN_CACHE: Mapping[str, int] = {"cpu": 6144, "cuda": 32768}
"""What ``dense_below="auto"`` means where queries attend to a cache, by kind of device: a token is faster sparse from
there on, by so much that this soon pays for the index states of the keys before. Other kinds count as a CPU."""

_numbers = itertools.count(2)  # a size of 0 or 1 would be a constant of a compiled program
_routers: weakref.WeakValueDictionary[int, Router] = weakref.WeakValueDictionary()

MIN_CONTENT_SLOTS = 8
"""Slots that content sources keep where band and columns alone take the whole budget, as in the original project."""


class Router(nn.Module):
    """The sources of one layer, resolved once, and the rules that merge their proposals.

    Bands and columns are united. Listed keys that are forbidden by a mask or already covered are dropped, each key
    is kept once, and what remains of the budget goes to the candidates of all sources together with the highest
    exact ``q·k``. Neighbors of the band and the columns are never dropped for content. Spans and slices that are
    attended whole stay what they are if one source brings them and nothing is listed; otherwise they become lists,
    beside the budget, since only lists can be compared key by key.

    Args:
        config: the source mix, the budget and the heads.
        layer: what the sources may know; made from ``config`` if left out.
        registry: where source names are looked up; the default registry if left out.

    Attributes:
        name: what reports call the layer; empty unless a model says.
        last_audit: of the last call; ``None`` where it was not audited.
    """

    handle: Tensor

    def __init__(
        self, config: SSAConfig, layer: LayerSpec | None = None, registry: SourceRegistry | None = None
    ) -> None:
        super().__init__()
        if config.layers is not None:
            raise ConfigError(
                "this configuration differs from layer to layer (layers=...), and here is one layer; pass "
                "config.for_layer(index)"
            )
        self.config = copy(config)
        self.layer = layer_spec(config) if layer is None else layer
        self.registry = default_registry() if registry is None else registry
        self.mix = config.source_mix
        self.shared_by_group = config.graph_heads == "kv"
        self.dense_below = config.dense_below
        self.backend = config.backend
        self.name = ""
        self.audit_options = config.audit_options
        self.last_audit: AuditReport | None = None
        self._calls = 0
        classes = {name: self.registry.get(name) for name in self.mix}
        self.sources = nn.ModuleDict(
            {name: create_source(name, classes[name], self.layer, options) for name, options in self.mix.items()}
        )
        self.learning = [name for name, source_class in classes.items() if source_class.learns]
        self._enlist()

    def _enlist(self, device: torch.device | None = None) -> None:
        """Give this router a handle: an empty tensor whose size is the number under which `find_router` finds it.

        A number, or a buffer, would be a constant of a compiled program, and each layer a program of its own.
        """
        number = next(_numbers)
        _routers[number] = self
        self.handle = torch.empty((0, number), dtype=torch.uint8, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist(self.handle.device)  # a copy is another router

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        self.handle = fn(self.handle)
        return self

    def source_state(self) -> dict[str, Tensor]:
        """The tensors of all sources, persistent or not, by name."""
        return {**dict(self.sources.named_parameters()), **dict(self.sources.named_buffers())}

    def set_source_state(self, state: Mapping[str, Tensor]) -> None:
        """Use these very tensors, without gradients, in place of those of `source_state`.

        Raises:
            ConfigError: names that the sources do not have, or lack.
        """
        own = self.source_state()
        if own.keys() != state.keys():
            raise ConfigError(
                f"the sources {', '.join(self.sources)} hold the tensors {', '.join(own) or 'none'}, "
                f"got {', '.join(state) or 'none'}: they are of another version than the one that was saved"
            )
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            module = self.sources.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def extra_repr(self) -> str:
        return f"num_neighbors={self.layer.num_neighbors}, graph_heads={self.layer.graph_heads}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        mask: EdgeMask,
        *,
        cross: bool = False,
        source_inputs: Mapping[str, Any] | None = None,
        cache: IndexStates | None = None,
    ) -> NeighborGraph:
        """Build the graph.

        Args:
            q: ``[B, H, N, D]``. k: ``[B, Hkv, M, D]``.
            mask: what is allowed.
            cross: queries and keys are different sequences; sources that compare positions sit out.
            source_inputs: per source name, what the caller wants to tell it with this call.
            cache: where sources keep their states of the keys ``k``, whose last tokens the queries are.

        Raises:
            ConfigError: no source is left, or inputs for a source that is not in the mix.
            ProposalError: a source returned something invalid.
            BudgetError: guaranteed neighbors do not fit.

        Warns:
            BudgetWarning: band and columns alone take the whole budget.
        """
        if torch.compiler.is_compiling():
            return _outside(self, q, k, mask, cross=cross, source_inputs=source_inputs, cache=cache)
        dense_below = self.dense_below
        if cache is not None:
            cache.bind(self)
            dense_below = self.dense_below_in_cache(k.device)
        elif dense_below == "auto":
            dense = not source_inputs and faster_dense(self, q, k, causal=mask.causal, cross=cross)
            dense_below = k.shape[2] + 1 if dense else None
        graph = self.route(q, k, mask, cross=cross, source_inputs=source_inputs, dense_below=dense_below, cache=cache)
        self.registry.graph_built(graph, self.layer)
        return graph

    def dense_below_in_cache(self, device: torch.device) -> int | None:
        """``dense_below`` for queries on a cache: ``"auto"`` is a fixed number there, since what is faster depends on
        how many queries come at once, and the result must not."""
        if self.dense_below != "auto":
            return self.dense_below
        return DENSE_BELOW_IN_CACHE.get(device.type, DENSE_BELOW_IN_CACHE["cpu"])

    def route(
        self,
        q: Tensor,
        k: Tensor,
        mask: EdgeMask,
        *,
        cross: bool,
        source_inputs: Mapping[str, Any] | None = None,
        dense_below: int | None = None,
        cache: IndexStates | None = None,
        partial: bool = False,
        spread: SpreadSegments | None = None,
    ) -> NeighborGraph:
        """`forward` with a given ``dense_below``, and unobserved. ``partial``, ``spread``: see `RoutingContext`."""
        inputs = dict(source_inputs or {})
        unknown = inputs.keys() - self.sources.keys()
        if unknown:
            raise ConfigError(
                f"source_inputs name {', '.join(sorted(unknown))}; the sources of this layer: {', '.join(self.sources)}"
            )
        active = {name: source for name, source in self.sources.items() if not (cross and source.needs_positions)}
        if not active:
            raise ConfigError(
                f"none of the sources {', '.join(self.sources)} works across two sequences (they compare positions); "
                f"add one that does, such as 'global', 'lsh' or 'topk'"
            )
        if k.shape[2] and (dense_below or 0) > k.shape[2]:
            return self._full_graph(q, k, mask, {}, credit="dense")
        # Routing decides by comparing numbers, so it keeps the precision of what it is given.
        enabled = torch.is_autocast_enabled(q.device.type)
        with torch.autocast(q.device.type, enabled=False) if enabled else nullcontext():
            return self._build(
                q, k, mask, active, inputs, may_be_dense=dense_below != 0, cache=cache, partial=partial, spread=spread
            )

    def audit(self, q: Tensor, k: Tensor, graph: NeighborGraph, *, scale: float | None = None) -> None:
        """Estimate what a graph of this router misses, if the configuration asks for it and it is this call's turn,
        put it into `last_audit`, and tell the observers (`ssa_graph_audited`). Arguments as in `audit_graph`."""
        if self.audit_options is None:
            return
        self.last_audit = None
        call, self._calls = self._calls, self._calls + 1
        if call % self.audit_options.every:
            return
        draw = zlib.crc32(f"{self.audit_options.seed} {self.name} {call}".encode())
        self.last_audit = audit_graph(
            q,
            k,
            graph,
            options=self.audit_options,
            scale=scale,
            generator=torch.Generator().manual_seed(draw),
            layer=self.name,
        )
        if self.last_audit is not None:
            self.registry.graph_audited(self.last_audit, self.layer)

    def _build(
        self,
        q: Tensor,
        k: Tensor,
        mask: EdgeMask,
        active: Mapping[str, nn.Module],
        inputs: Mapping[str, Any],
        may_be_dense: bool,
        cache: IndexStates | None,
        partial: bool,
        spread: SpreadSegments | None,
    ) -> NeighborGraph:
        keys = k.shape[2]
        routing_q = self._routing_queries(q, k)
        collected = self._collect(routing_q, k, mask, active, inputs, cache, partial, spread)
        bands = [(name, _clip(p, mask.causal)) for name, p in collected if isinstance(p, Band)]
        proposed_columns = [(name, p) for name, p in collected if isinstance(p, Columns)]
        records: dict[str, SourceRecord] = {}
        for name, _ in collected:
            if name not in records:
                its = _unite([b for owner, b in bands if owner == name])
                some = [p for owner, p in proposed_columns if owner == name]
                records[name] = SourceRecord(band=its, columns=unite_columns(some, q.device))
        band = _unite([b for _, b in bands])
        columns = unite_columns([p for _, p in proposed_columns], q.device)
        waiting = sum([max(p.slots - len(p.positions), 0) for _, p in proposed_columns])
        budget = self.layer.num_neighbors - _width(band, columns, keys) - waiting
        everything = self._proposer_of_everything(collected, keys)
        if everything is not None and may_be_dense:
            return self._full_graph(q, k, mask, records, credit=everything)
        whole = _attended_whole(collected, keys)
        listed = (
            [] if whole is not None else _as_lists(collected, q.shape[1] if not self.shared_by_group else k.shape[1])
        )
        if listed and budget < 1:
            budget = MIN_CONTENT_SLOTS
            warnings.warn(
                f"band and columns take {_width(band, columns, keys)} of num_neighbors = {self.layer.num_neighbors}; "
                f"{', '.join(p.source for p in listed)} share {budget} slots beside them",
                BudgetWarning,
                stacklevel=2,
            )
        neighbors = None
        if listed:
            eligible = Eligible(mask, q.shape[1], keys, band, columns, zero_padding=cache is not None)
            selection = select_neighbors(routing_q, k.detach(), listed, eligible, max(1, budget), backend=self.backend)
            neighbors = selection.neighbors
            for p in listed:
                records[p.owner] = _with_selected(records[p.owner], p, selection)
        spans, slices = (None, None) if whole is None else (whole.spans, whole.slices)
        summaries = self._summaries(collected, mask, columns, cache)
        for name in records:
            kinds = {type(proposal) for owner, proposal in collected if owner == name}
            if kinds & {Spans, Ranges, Summaries}:
                records[name] = replace(
                    records[name],
                    spans=spans is not None and Spans in kinds,
                    slices=slices is not None and Ranges in kinds,
                    summaries=Summaries in kinds,
                )
        return NeighborGraph(
            batch=q.shape[0],
            num_heads=q.shape[1],
            graph_heads=k.shape[1] if self.shared_by_group else q.shape[1],
            num_keys=keys,
            mask=mask,
            band=band,
            columns=columns,
            neighbors=neighbors,
            spans=spans,
            slices=slices,
            summaries=summaries,
            sources=records,
        )

    def _summaries(
        self,
        collected: Sequence[tuple[str, Proposal]],
        mask: EdgeMask,
        columns: Tensor | None,
        cache: IndexStates | None,
    ) -> Summaries | None:
        found = [(name, proposal) for name, proposal in collected if isinstance(proposal, Summaries)]
        if len(found) > 1:
            raise ConfigError(
                f"sources {' and '.join(repr(name) for name, _ in found)} return summaries; a graph holds those of one "
                f"source, so switch them off for the others"
            )
        if not found:
            return None
        name, summaries = found[0]
        made = None if cache is None else cache.summarised(name, summaries, mask, columns)
        return clean_summaries(summaries, name, mask, columns) if made is None else made

    def _routing_queries(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, N, D]`` → ``[B, G, N, D]``: a group that shares a graph is routed by its mean query, since the
        mean of its heads' scores is the score of their mean."""
        q = q.detach()
        if not self.shared_by_group or q.shape[1] == k.shape[1]:
            return q
        grouped = q.unflatten(1, (k.shape[1], -1))
        if q.is_cuda:
            return grouped.mean(dim=2)  # it adds up in float32 and rounds once
        return grouped.mean(dim=2, dtype=q.dtype if q.dtype == torch.float64 else torch.float32).to(q.dtype)

    def _collect(
        self,
        q: Tensor,
        k: Tensor,
        mask: EdgeMask,
        active: Mapping[str, nn.Module],
        inputs: Mapping[str, Any],
        cache: IndexStates | None,
        partial: bool,
        spread: SpreadSegments | None,
    ) -> list[tuple[str, Proposal]]:
        """What every source proposes, by its name, in the order of the sources."""
        collected: list[tuple[str, Proposal]] = []
        bands: list[Band | None] = []
        listed = 0
        # on a GPU, all of them are looked at together, in few launches
        pending: list[Bounds] | None = [] if k.is_cuda else None
        for name, source in active.items():
            assert isinstance(source, NeighborSource)
            budget = self.layer.num_neighbors - _width(_unite(bands), None, k.shape[2]) - listed
            with torch.set_grad_enabled(source.learns and torch.is_grad_enabled()):
                ctx = RoutingContext(
                    q=q,
                    shared_k=k if source.learns else k.detach(),
                    mask=mask,
                    budget=budget if budget > 0 else MIN_CONTENT_SLOTS,
                    seed=self.layer.seed,
                    inputs=inputs.get(name),
                    decoding=cache is not None,
                    partial=partial,
                    first_graph_head=mask.head_offset * self.layer.graph_heads // self.layer.num_heads,
                    spread=spread,
                )
                if ctx.num_keys == 0 or ctx.num_queries == 0 or ctx.batch == 0:
                    continue  # nothing to route; the graph is empty
                if cache is not None:
                    ctx = cache.indexed(name, source, ctx)
                proposals = validate_proposals(
                    source.propose(ctx),
                    name,
                    batch=ctx.batch,
                    graph_heads=ctx.graph_heads,
                    kv_heads=k.shape[1],
                    queries=ctx.num_queries,
                    keys=ctx.num_keys,
                    device=ctx.device,
                    known=None if cache is None else cache.known(name),
                    pending=pending,
                )
            for proposal in proposals:
                if isinstance(proposal, Band) and not source.needs_positions:
                    raise ProposalError(
                        f"source {name!r} returned a Band, which compares positions; set needs_positions = True on "
                        f"{type(source).__name__}"
                    )
                if isinstance(proposal, Band):
                    bands.append(_clip(proposal, mask.causal))
                elif isinstance(proposal, Columns):
                    listed += max(len(proposal.positions), proposal.slots)
                elif isinstance(proposal, Candidates) and proposal.guaranteed:
                    listed += proposal.indices.shape[-1]
                collected.append((name, proposal))
        if pending:
            outside = any_outside(pending, k.device)
            require(~outside, lambda: "a source proposed indices that are out of bounds")
        return collected

    def _proposer_of_everything(self, collected: Sequence[tuple[str, Proposal]], keys: int) -> str | None:
        """The source that proposes every key, where they all fit: the graph then holds every allowed key."""
        for name, proposal in collected:
            if isinstance(proposal, Ranges) and proposal.is_everything:
                fits = proposal.attend == "all" or self.layer.num_neighbors >= keys
                if fits:
                    return name
        return None

    def _full_graph(
        self, q: Tensor, k: Tensor, mask: EdgeMask, records: Mapping[str, SourceRecord], credit: str
    ) -> NeighborGraph:
        """Every allowed key, as one band."""
        keys = k.shape[2]
        reach = keys
        if mask.offset is not None:
            reach = max(keys, mask.offset + q.shape[2])
        elif mask.positions.numel():
            reach = max(keys, int(mask.positions.max()) + 1)
        band = Band(before=reach, after=0 if mask.causal else reach)
        return NeighborGraph(
            batch=q.shape[0],
            num_heads=q.shape[1],
            graph_heads=k.shape[1] if self.shared_by_group else q.shape[1],
            num_keys=keys,
            mask=mask,
            band=band,
            sources={**records, credit: SourceRecord(band=band)},
        )


@torch.compiler.disable(
    reason="a NeighborGraph cannot be part of a compiled program, and what needs one breaks it: build_graph(), "
    "return_stats=True, mask_mod, a cache, a registry passed to a function"
)
def _outside(router: Router, *args: Any, **options: Any) -> NeighborGraph:
    """Build a graph outside of the program that is being compiled."""
    graph: NeighborGraph = router(*args, **options)
    return graph


def find_router(handle: Tensor) -> Router:
    """The router that has this handle.

    Raises:
        GraphError: it is gone.
    """
    router = _routers.get(handle.shape[1])
    if router is None:
        raise GraphError("the layer that this program was compiled for is gone, and its neighbor sources with it")
    return router


def layer_spec(config: SSAConfig) -> LayerSpec:
    """What the sources of a layer with this configuration may know of it."""
    return LayerSpec(
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        graph_heads=config.num_heads if config.graph_heads == "query" else config.kv_heads,
        num_neighbors=config.num_neighbors,
        causal=config.causal,
        seed=config.seed,
    )


def _clip(band: Band, causal: bool) -> Band:
    return Band(band.before, 0) if causal else band


def _unite(bands: Sequence[Band | None]) -> Band | None:
    some = [b for b in bands if b is not None]
    return Band(max(b.before for b in some), max(b.after for b in some)) if some else None


@dataclass(frozen=True)
class _Whole:
    """Keys that are attended whole, as they were proposed."""

    spans: Spans | None
    slices: Ranges | None


def _attended_whole(collected: Sequence[tuple[str, Proposal]], keys: int) -> _Whole | None:
    """Spans and slices that need no lists; ``None`` where something has to be listed, or they might overlap."""
    spans = [p for _, p in collected if isinstance(p, Spans)]
    ranges = [p for _, p in collected if isinstance(p, Ranges)]
    lists = any(isinstance(p, Candidates) for _, p in collected)
    if lists or len(spans) > 1 or len(ranges) > 1 or any(r.attend != "all" or r.limit is not None for r in ranges):
        return None
    if not ranges:
        return _Whole(spans[0] if spans else None, None)
    slices = ranges[0]
    if slices.start is None or slices.end is None or slices.start.shape[3] != 1:
        return None
    if slices.order is None:
        order = torch.arange(keys, dtype=torch.int32, device=slices.start.device).view(1, 1, 1, -1)
        slices = replace(slices, order=order)
    return _Whole(spans[0] if spans else None, slices)


def _as_lists(collected: Sequence[tuple[str, Proposal]], graph_heads: int) -> list[Proposed]:
    """What has to be listed, spans and slices that are attended whole included."""
    listed: list[Proposed] = []
    for name, proposal in collected:
        if isinstance(proposal, Spans):
            start, end = (x[:, None, :, None, None] for x in (proposal.start, proposal.end))
            proposal = Ranges(None, start, end, attend="all")
        if isinstance(proposal, Ranges) and proposal.order is not None and 1 < proposal.order.shape[1] < graph_heads:
            repeats = graph_heads // proposal.order.shape[1]
            proposal = replace(proposal, order=proposal.order.repeat_interleave(repeats, dim=1))
        if isinstance(proposal, (Candidates, Ranges)):
            again = sum(p.owner == name for p in listed)
            listed.append(Proposed(f"{name} ({again + 1})" if again else name, proposal, name))
    return listed


def _with_selected(record: SourceRecord, p: Proposed, selection: Selection) -> SourceRecord:
    scored, listed = selection.keys_scored[p.source], selection.listed[p.source]
    if isinstance(p.proposal, Candidates) and p.proposal.keys_scored is not None:
        scored = torch.maximum(scored, torch.as_tensor(p.proposal.keys_scored, device=scored.device))
    if record.listed is not None and record.keys_scored is not None:
        listed, scored = record.listed + listed, record.keys_scored + scored
    return replace(record, listed=listed, keys_scored=scored)


def _width(band: Band | None, columns: Tensor | None, keys: int) -> int:
    return (min(band.width, keys) if band is not None else 0) + (columns.numel() if columns is not None else 0)
