"""What source mixes do to the layers of a model, head by head and source by source, as plain data."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.laboratory.capture import LayerTensors, capture_layers, choose_layers
from ssa_framework.laboratory.files import replace_json
from ssa_framework.laboratory.routing import Membership, MixRouter, sample_queries
from ssa_framework.quality.bench import environment
from ssa_framework.quality.rows import BestKeys, DenseRows, KeptRows, SummaryMeans, row_chunks
from ssa_framework.quality.sample import pick_queries
from ssa_framework.registry import SourceRegistry

EXACT_AT = (32, 128, 512)
"""For how many keys the exact top-K is looked at, beside the mixes."""

PerHead = tuple[float, ...]
"""One number for each query head."""


@dataclass(frozen=True)
class SourceFigures:
    """What one source brought, per query head; means over the sampled queries.

    Attributes:
        recall: share of the k keys with the largest weight that are neighbors and that it proposed.
        attention_mass: share of the dense softmax weights on neighbors that it proposed.
        only_mass: the same of neighbors that no other source proposed: what would be lost without it.
        output_error, output_error_p95: of attention to the neighbors that it proposed, and its summaries, alone; mean,
            and what 95 % of the queries have at most.
        error_without: mean of attention without the neighbors that it alone proposed, and without its summaries. Other
            sources do not take their slots here.
        slots: neighbors per query that count for it: each counts for the first source that proposed it.
        keys_proposed: distinct allowed keys per query that it proposed, neighbors or not.
        keys_scored: keys per query whose ``q·k`` was computed for it. Where a source reports one number for all heads,
            as a search index does, that one.
    """

    recall: PerHead
    attention_mass: PerHead
    only_mass: PerHead
    output_error: PerHead
    output_error_p95: PerHead
    error_without: PerHead
    slots: PerHead
    keys_proposed: PerHead
    keys_scored: PerHead


@dataclass(frozen=True)
class MixFigures:
    """What a mix does to one layer, per query head; means over the sampled queries.

    Attributes:
        recall: share of the k keys with the largest weight that are neighbors.
        attention_mass: share of the dense softmax weights on neighbors.
        output_error, output_error_p95: ``‖o_sparse − o_dense‖ / ‖o_dense‖`` of a query, mean, and what 95 % of the
            queries have at most.
        slots: neighbors per query. summaries: summaries per query.
        keys_scored: keys per query, all sources together.
        overlap: Jaccard similarity of the neighbors with those of the same head and query in the layer before, of
            those that were looked at; ``None`` in the first.
        sources: by name.
    """

    recall: PerHead
    attention_mass: PerHead
    output_error: PerHead
    output_error_p95: PerHead
    slots: PerHead
    summaries: PerHead
    keys_scored: PerHead
    overlap: PerHead | None
    sources: Mapping[str, SourceFigures]


@dataclass(frozen=True)
class ExactFigures:
    """What the exact best keys of each query hold, per query head: how diffuse its attention is.

    Attributes:
        keys: how many, where a query may attend that many.
        attention_mass, output_error: as in `MixFigures`.
    """

    keys: int
    attention_mass: PerHead
    output_error: PerHead


@dataclass(frozen=True)
class LayerInspection:
    """One layer.

    Attributes:
        layer: its index. heads, kv_heads, head_dim: its sizes.
        allowed: keys per query that it may attend, mean over the sampled queries.
        exact: for each of the numbers of keys that were asked for.
        mixes: by name.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    allowed: float
    exact: tuple[ExactFigures, ...]
    mixes: Mapping[str, MixFigures]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """Everything that was found.

    Attributes:
        model, text: what they are called. length: tokens.
        mixes: the configuration of each mix, by name, as JSON values.
        wanted: indices of the layers that were asked for. layers: those that were looked at.
        queries: how many were sampled per head. first_query: the position that the sample begins at.
        recall_at: k. seed: of the sample.
        seconds: that it took so far, the model's forward pass included.
        environment: device, versions, commit and date.
    """

    model: str
    text: str
    length: int
    mixes: Mapping[str, Mapping[str, Any]]
    wanted: tuple[int, ...]
    layers: tuple[LayerInspection, ...]
    queries: int
    first_query: int
    recall_at: int
    seed: int
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all layers that were asked for were looked at."""
        return len(self.layers) == len(self.wanted)

    def mean(self, mix: str, figure: str, source: str | None = None) -> float | None:
        """Mean of one figure over layers and heads; ``None`` where no layer has it.

        Args:
            figure: a field of `MixFigures`, or of `SourceFigures` if a source is named.
        """
        values = [
            value for layer in self.layers for value in getattr(_of(layer.mixes[mix], source), figure, None) or ()
        ]
        return sum(values) / len(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "complete": self.complete}

    def write_json(self, path: str | Path) -> None:
        """Write `as_dict`. The file is replaced at once, so that a run that ends meanwhile leaves a whole one."""
        replace_json(path, self.as_dict())


def _of(figures: MixFigures, source: str | None) -> MixFigures | SourceFigures | None:
    return figures if source is None else figures.sources.get(source)


def inspect_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixes: Mapping[str, SSAConfig],
    *,
    causal: bool = True,
    scale: float | None = None,
    queries: int = 256,
    first_query: int = 0,
    recall_at: int = 32,
    seed: int = 0,
    exact_at: Sequence[int] = EXACT_AT,
    registry: SourceRegistry | None = None,
) -> LayerInspection:
    """What mixes do to queries, keys and values, as `inspect_model` for one layer.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, N, D]``. value: ``[B, Hkv, N, Dv]``.
        mixes: configurations by name; their sizes and ``dense_below`` are not used.
        causal, scale: of the attention.
        queries, first_query, recall_at, seed, exact_at, registry: as in `inspect_model`.

    Raises:
        SSAError: tensors that do not fit together, numbers out of range, or what sources and router raise.
    """
    inspector = Inspector(
        mixes,
        queries=queries,
        first_query=first_query,
        recall_at=recall_at,
        seed=seed,
        exact_at=exact_at,
        registry=registry,
    )
    return inspector.inspect(LayerTensors(0, query, key, value, scale, causal))


def inspect_model(
    model: Any,
    tokens: Tensor,
    mixes: Mapping[str, SSAConfig],
    *,
    layers: Iterable[int] | None = None,
    queries: int = 256,
    first_query: int = 0,
    recall_at: int = 32,
    seed: int = 0,
    exact_at: Sequence[int] = EXACT_AT,
    registry: SourceRegistry | None = None,
    model_name: str = "",
    text_name: str = "",
    on_layer: Callable[[Inspection], object] | None = None,
) -> Inspection:
    """Look at what mixes would do to the layers of a model while it reads a text densely.

    Each layer is looked at by itself, on the queries, keys and values of the dense model, so errors of other layers
    are not in it. A sample of the queries is routed among all keys. The tensors of one layer are held at a time.

    Interrupted with Ctrl-C, it returns the layers that are done; `Inspection.complete` tells.

    Args:
        model: see `capture_layers`. tokens: int64 ``[B, N]``, without padding.
        mixes: configurations by name; their sizes and ``dense_below`` are not used.
        layers: indices; all layers that attend all tokens if left out.
        queries: at most so many per head, one drawn from each of as many equal stretches behind ``first_query``, the
            same for all layers, heads and mixes.
        first_query: position of the first query that may be drawn: early ones have few keys to choose from.
        recall_at: k of the recall. seed: of the sample.
        exact_at: numbers of exact best keys to look at beside the mixes.
        registry: where source names are looked up.
        model_name, text_name: what the result calls them.
        on_layer: called with everything so far after each layer.

    Raises:
        SSAError: what `capture_layers`, sources and router raise, or numbers out of range.
    """
    started = time.perf_counter()
    inspector = Inspector(
        mixes,
        queries=queries,
        first_query=first_query,
        recall_at=recall_at,
        seed=seed,
        exact_at=exact_at,
        registry=registry,
    )
    wanted = choose_layers(model, layers)
    done: list[LayerInspection] = []

    def so_far() -> Inspection:
        return Inspection(
            model=model_name or type(model).__name__,
            text=text_name,
            length=tokens.shape[1],
            mixes={name: config.to_dict() for name, config in mixes.items()},
            wanted=wanted,
            layers=tuple(done),
            queries=min(queries, tokens.shape[1] - first_query),
            first_query=first_query,
            recall_at=recall_at,
            seed=seed,
            seconds=time.perf_counter() - started,
            environment=environment(str(tokens.device)),
        )

    def consume(layer: LayerTensors) -> None:
        done.append(inspector.inspect(layer))
        if on_layer is not None:
            on_layer(so_far())

    with contextlib.suppress(KeyboardInterrupt):
        capture_layers(model, tokens, consume, layers=wanted)
    return so_far()


class Inspector:
    """Looks at one layer after the other; see `inspect_model` for the arguments."""

    def __init__(
        self,
        mixes: Mapping[str, SSAConfig],
        *,
        queries: int = 256,
        first_query: int = 0,
        recall_at: int = 32,
        seed: int = 0,
        exact_at: Sequence[int] = EXACT_AT,
        registry: SourceRegistry | None = None,
    ) -> None:
        if not mixes:
            raise ConfigError("there is no mix to look at")
        for name, number in (("recall_at", recall_at), *(("exact_at", count) for count in exact_at)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {number!r}")
        self.routers = {name: MixRouter(config, registry) for name, config in mixes.items()}
        self.queries = queries
        self.first_query = first_query
        self.recall_at = recall_at
        self.seed = seed
        self.exact_at = tuple(exact_at)
        self._previous: dict[str, NeighborGraph] = {}

    @torch.no_grad()
    def inspect(self, layer: LayerTensors) -> LayerInspection:
        """The next layer."""
        layer.require_finite()
        rows = sample_queries(layer, self.queries, first_query=self.first_query, seed=self.seed)
        routed = {name: router.route(layer, rows) for name, router in self.routers.items()}
        tallies = {name: _Tally() for name in routed}
        exact = _Tally()
        query = layer.q[:, :, rows]
        means = {name: SummaryMeans.of(layer.k, layer.v, r.graph) for name, r in routed.items()}
        for chunk in row_chunks(query, layer.k):
            pieces = {name: pick_queries(r.graph, chunk) for name, r in routed.items()}
            mask = next(iter(pieces.values())).mask
            dense = DenseRows.of(query[:, :, chunk], layer.k, layer.v, mask, layer.scale)
            best = dense.best(self.recall_at)
            self._add_exact(exact, dense)
            for name, piece in pieces.items():
                mean = means[name]
                kept = dense.keep_graph(piece, None if mean is None else mean.rows(query[:, :, chunk], layer.scale))
                neighbors = torch.where(kept.scores > float("-inf"), kept.keys, -1)
                membership = routed[name].membership(piece, chunk, neighbors)
                _add_mix(tallies[name], kept, best, membership, routed[name].graph)
        graphs = {name: r.graph for name, r in routed.items()}
        overlaps = {name: self._overlap(name, graph) for name, graph in graphs.items()}
        self._previous = graphs
        return LayerInspection(
            layer=layer.layer,
            heads=layer.q.shape[1],
            kv_heads=layer.k.shape[1],
            head_dim=layer.q.shape[3],
            allowed=exact.mean_of_all("allowed"),
            exact=tuple(
                ExactFigures(count, exact.mean(f"mass {count}"), exact.mean(f"error {count}"))
                for count in self.exact_at
            ),
            mixes={name: tally.figures(routed[name].graph, overlaps[name]) for name, tally in tallies.items()},
        )

    def _add_exact(self, tally: _Tally, dense: DenseRows) -> None:
        tally.add("allowed", dense.allowed)
        if not self.exact_at:
            return
        best = dense.best(max(self.exact_at))
        slot = torch.arange(best.keys.shape[-1], device=best.keys.device)
        kept = dense.keep(torch.where(slot < best.wanted[..., None], best.keys, -1))
        members = [(slot < count).expand_as(kept.scores) for count in self.exact_at]
        errors, _ = kept.errors([*members], [False] * len(members))
        for count, some, error in zip(self.exact_at, members, errors, strict=True):
            tally.add(f"mass {count}", kept.mass(some))
            tally.add(f"error {count}", error)

    def _overlap(self, name: str, graph: NeighborGraph) -> PerHead | None:
        previous = self._previous.get(name)
        if previous is None:
            return None
        sizes = [(g.batch, g.num_heads, g.graph_heads, g.num_queries, g.num_keys) for g in (graph, previous)]
        if sizes[0] != sizes[1]:
            return None
        overlap = graph.overlap(previous).repeat_interleave(graph.num_heads // graph.graph_heads, dim=1)
        return _numbers(overlap.double().mean(dim=(0, 2)))


def _add_mix(
    tally: _Tally, kept: KeptRows, best: BestKeys, membership: Mapping[str, Membership], graph: NeighborGraph
) -> None:
    """Figures of a chunk of queries, whose neighbors are ``kept``; ``graph`` says whose summaries are in them."""
    neighbor = kept.scores > float("-inf")
    proposers = torch.stack([m.proposed for m in membership.values()]).sum(0)
    only = {name: m.proposed & (proposers == 1) for name, m in membership.items()}
    brought = [graph.sources[name].summaries for name in membership]
    members = [None, *(m.proposed for m in membership.values()), *(neighbor & ~mine for mine in only.values())]
    errors, _ = kept.errors(members, [True, *brought, *(not summaries for summaries in brought)])
    tally.add("recall", kept.recall(best))
    tally.add("mass", kept.mass())
    tally.add("error", errors[0])
    tally.add("slots", kept.degree())
    tally.add("summaries", kept.summaries())
    alone, without = errors[1:].split(len(membership))
    for (name, m), error, error_without in zip(membership.items(), alone, without, strict=True):
        tally.add(f"recall of {name}", kept.recall(best, m.proposed))
        tally.add(f"mass of {name}", kept.mass(m.proposed))
        tally.add(f"only mass of {name}", kept.mass(only[name]))
        tally.add(f"error of {name}", error)
        tally.add(f"error without {name}", error_without)
        tally.add(f"slots of {name}", m.credited.sum(-1))
        tally.add(f"proposed of {name}", m.keys)
        tally.add(f"scored of {name}", m.scored)


class _Tally:
    """Collects figures ``[B, H, T]`` of chunks of queries, by name."""

    def __init__(self) -> None:
        self._chunks: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, figure: Tensor) -> None:
        self._chunks[name].append(figure.double().cpu())

    def mean(self, name: str) -> PerHead:
        return _numbers(torch.cat(self._chunks[name], dim=-1).mean(dim=(0, 2)))

    def mean_of_all(self, name: str) -> float:
        return _number(float(torch.cat(self._chunks[name], dim=-1).mean()))

    def p95(self, name: str) -> PerHead:
        values = torch.cat(self._chunks[name], dim=-1).transpose(0, 1).flatten(1)  # [H, B · T]
        return _numbers(np.quantile(values.numpy(), 0.95, axis=1))

    def figures(self, graph: NeighborGraph, overlap: PerHead | None) -> MixFigures:
        sources = {
            name: SourceFigures(
                recall=self.mean(f"recall of {name}"),
                attention_mass=self.mean(f"mass of {name}"),
                only_mass=self.mean(f"only mass of {name}"),
                output_error=self.mean(f"error of {name}"),
                output_error_p95=self.p95(f"error of {name}"),
                error_without=self.mean(f"error without {name}"),
                slots=self.mean(f"slots of {name}"),
                keys_proposed=self.mean(f"proposed of {name}"),
                keys_scored=self._keys_scored(f"scored of {name}", reported),
            )
            for name, reported in graph.keys_scored().items()
        }
        return MixFigures(
            recall=self.mean("recall"),
            attention_mass=self.mean("mass"),
            output_error=self.mean("error"),
            output_error_p95=self.p95("error"),
            slots=self.mean("slots"),
            summaries=self.mean("summaries"),
            keys_scored=_numbers(np.sum([s.keys_scored for s in sources.values()], axis=0)),
            overlap=overlap,
            sources=sources,
        )

    def _keys_scored(self, name: str, reported: float) -> PerHead:
        """Per head what the router scored, unless the source reports something else, which is of all heads."""
        counted = self.mean(name)
        return counted if abs(sum(counted) / len(counted) - reported) <= 1e-4 * reported else (reported,) * len(counted)


def _number(value: float) -> float:
    return float(f"{value:.6g}")


def _numbers(values: Iterable[Any]) -> PerHead:
    return tuple(_number(float(value)) for value in values)
