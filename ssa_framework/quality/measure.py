"""`measure`: what a neighbor graph keeps of dense attention, on a sample of its queries."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.ops.neighbor_attention.api import check_graph, check_tensors
from ssa_framework.quality.rows import (
    BestKeys,
    DenseRows,
    KeptRows,
    SummaryMeans,
    covered_keys,
    in_fixed_part,
    row_chunks,
)
from ssa_framework.quality.sample import pick_queries, sample_rows

Name = TypeVar("Name", bound=Hashable)
"""What graphs are called."""


@dataclass(frozen=True)
class QualityReport:
    """What `measure` found. Means are over batch, query heads and the sampled queries that may attend something.

    Where there is no such query nothing is lost: recall and mass are 1, errors are 0.

    Attributes:
        queries: how many (batch, head, query) rows the means are over.
        recall_at: k.
        recall: share of a query's k allowed keys with the largest attention weight that are neighbors; of all its
            allowed keys where they are fewer than k. Keys that tie for the last place are interchangeable.
        recall_p5: 95 % of the queries have at least this recall.
        recall_beyond: the same recall with the keys of band and columns taken out of both sides, so that it tells
            how well content is found; ``None`` where no query has a key beyond them.
        attention_mass: share of the dense softmax weights that lies on neighbors.
        attention_mass_p5: 95 % of the queries have at least this mass.
        output_error: ``‖o_sparse − o_dense‖ / ‖o_dense‖`` of one query's output vector, averaged.
        output_error_p95: 95 % of the queries have at most this error.
        output_error_total: the same ratio of Frobenius norms over all rows at once.
        degree: neighbors per query.
        summaries: summaries that a query attends beside them; `recall` and `attention_mass` count none of them,
            `output_error` does.
        allowed: keys per query that the mask allows.
        keys_scored: per source, distinct keys per query whose ``q·k`` was computed for it; over all queries.
        slots: per source, neighbor slots per query that it filled; over all queries.
        share_scored: keys scored by all sources / ``allowed``. A key scored for two sources counts twice.
        candidates: keys per query that had a chance: for each source the keys it scored, or its slots where it
            filled them without scoring (band, columns, fixed patterns, slices attended whole); at least ``degree``.
        lift: ``recall / min(1, candidates / allowed)``: how many times better than the expected recall of as many
            keys picked at random, all of them kept. 1 says that the routing knows nothing.
        recall_per_head, attention_mass_per_head, output_error_per_head: float64 ``[B, H]`` on the CPU.
    """

    queries: int
    recall_at: int
    recall: float
    recall_p5: float
    recall_beyond: float | None
    attention_mass: float
    attention_mass_p5: float
    output_error: float
    output_error_p95: float
    output_error_total: float
    degree: float
    summaries: float
    allowed: float
    keys_scored: Mapping[str, float]
    slots: Mapping[str, float]
    share_scored: float
    candidates: float
    lift: float
    recall_per_head: Tensor
    attention_mass_per_head: Tensor
    output_error_per_head: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; tensors become nested lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else value


@torch.no_grad()
def measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: NeighborGraph,
    *,
    recall_at: int = 32,
    sample: int = 512,
    seed: int = 0,
    scale: float | None = None,
) -> QualityReport:
    """Compare attention over ``graph`` with dense attention over everything that the graph's mask allows.

    Both are computed here, from the same scores, so the result says what the graph is worth, whatever backend serves
    it. Time grows with ``sample · M``; memory is linear in M.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``. value: ``[B, Hkv, M, Dv]``.
        graph: built for these shapes.
        recall_at: k.
        sample: at most this many of the N queries, one drawn from each of ``sample`` equal stretches of the sequence
            (so early and late queries are represented alike), the same for all batch elements and heads.
        seed: of the sample.
        scale: of the scores, ``1 / sqrt(D)`` if left out.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together. GraphError: a graph that does not fit them.
        ConfigError: ``recall_at`` or ``sample`` below 1.
    """
    return measure_graphs(query, key, value, {"": graph}, recall_at=recall_at, sample=sample, seed=seed, scale=scale)[
        ""
    ]


@torch.no_grad()
def measure_graphs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graphs: Mapping[Name, NeighborGraph],
    *,
    recall_at: int = 32,
    sample: int = 512,
    seed: int = 0,
    scale: float | None = None,
) -> dict[Name, QualityReport]:
    """`measure` for several graphs of the same queries and keys; dense attention is computed once for all of them.

    Args:
        graphs: by name, built for these shapes and with the same masks, which only the first is asked for.

    Raises:
        ShapeError, DtypeError, GraphError, ConfigError: as `measure`; or no graph at all.
    """
    check_tensors(query, key, value)
    if not graphs:
        raise ConfigError("there is no graph to measure")
    for graph in graphs.values():
        check_graph(query, key, graph)
    for option, number in (("recall_at", recall_at), ("sample", sample)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{option} must be an integer >= 1, got {number!r}")
    batch, heads, queries = query.shape[:3]
    rows = sample_rows(queries, sample, seed, query.device)
    tallies = {name: _Tally(batch, heads) for name in graphs}
    if key.shape[2] and batch:
        picked = {name: pick_queries(graph, rows) for name, graph in graphs.items()}
        for chunks in _compare(query[:, :, rows], key, value, picked, recall_at, scale):
            for name, chunk in chunks.items():
                tallies[name].add(chunk)
    return {name: tally.report(graphs[name], recall_at) for name, tally in tallies.items()}


@dataclass(frozen=True)
class _Chunk:
    """Numbers of some queries, each ``[B, H, T]``; ``counts`` and ``beyond_counts`` are bool."""

    counts: Tensor
    recall: Tensor
    beyond_counts: Tensor
    beyond: Tensor
    mass: Tensor
    error: Tensor
    error_squared: Tensor
    norm_squared: Tensor
    degree: Tensor
    summaries: Tensor
    allowed: Tensor


def _compare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graphs: Mapping[Name, NeighborGraph],
    recall_at: int,
    scale: float | None,
) -> Iterator[dict[Name, _Chunk]]:
    """Chunks of the queries, for each graph."""
    means = {name: SummaryMeans.of(key, value, graph) for name, graph in graphs.items()}
    for rows in row_chunks(query, key):
        queries = query[:, :, rows]
        pieces = {name: pick_queries(graph, rows) for name, graph in graphs.items()}
        dense = DenseRows.of(queries, key, value, next(iter(pieces.values())).mask, scale)
        best = dense.best(recall_at)
        chunks = {}
        for name, piece in pieces.items():
            mean = means[name]
            kept = dense.keep_graph(piece, None if mean is None else mean.rows(queries, scale))
            chunks[name] = _compare_rows(kept, best, piece, recall_at)
        yield chunks


def _compare_rows(kept: KeptRows, best: BestKeys, graph: NeighborGraph, recall_at: int) -> _Chunk:
    """``graph``: of the same queries."""
    dense = kept.dense
    beyond = dense.best_outside(covered_keys(graph), recall_at)
    (error,), (difference,) = kept.errors([None], [True])
    return _Chunk(
        counts=dense.allowed > 0,
        recall=kept.recall(best),
        beyond_counts=beyond.wanted > 0,
        beyond=kept.recall(beyond, ~in_fixed_part(kept.keys, graph)),
        mass=kept.mass(),
        error=error,
        error_squared=difference.double().square(),
        norm_squared=dense.out.norm(dim=-1).double().square(),
        degree=kept.degree(),
        summaries=kept.summaries(),
        allowed=dense.allowed,
    )


class _Tally:
    """Collects the chunks."""

    def __init__(self, batch: int, heads: int) -> None:
        self.shape = (batch, heads)
        self.chunks: list[_Chunk] = []

    def add(self, chunk: _Chunk) -> None:
        on_cpu = {f.name: getattr(chunk, f.name).cpu() for f in fields(chunk)}
        on_cpu |= {name: x.double() for name, x in on_cpu.items() if x.dtype != torch.bool}
        self.chunks.append(_Chunk(**on_cpu))

    def _all(self, name: str) -> Tensor:
        """``[B, H, T]`` of all chunks; float64, the conditions bool."""
        parts = [getattr(chunk, name) for chunk in self.chunks]
        empty = torch.zeros((*self.shape, 0), dtype=torch.bool if name.endswith("counts") else torch.float64)
        return torch.cat(parts, dim=-1) if parts else empty

    def report(self, graph: NeighborGraph, recall_at: int) -> QualityReport:
        counts, beyond_counts = self._all("counts"), self._all("beyond_counts")
        recall, mass, error = self._all("recall"), self._all("mass"), self._all("error")
        degree, allowed = _mean(self._all("degree"), counts), _mean(self._all("allowed"), counts)
        scored, slots = graph.keys_scored(), graph.slots_by_source()
        candidates = max(degree, sum(max(scored[name], slots[name]) for name in scored))
        chance = min(1.0, candidates / allowed) if allowed else 0.0
        mean_recall = _mean(recall, counts, empty=1.0)
        norm = float(self._all("norm_squared").sum())
        return QualityReport(
            queries=int(counts.sum()),
            recall_at=recall_at,
            recall=mean_recall,
            recall_p5=_quantile(recall, counts, 0.05, empty=1.0),
            recall_beyond=_mean(self._all("beyond"), beyond_counts) if bool(beyond_counts.any()) else None,
            attention_mass=_mean(mass, counts, empty=1.0),
            attention_mass_p5=_quantile(mass, counts, 0.05, empty=1.0),
            output_error=_mean(error, counts),
            output_error_p95=_quantile(error, counts, 0.95, empty=0.0),
            output_error_total=(float(self._all("error_squared").sum()) / norm) ** 0.5 if norm else 0.0,
            degree=degree,
            summaries=_mean(self._all("summaries"), counts),
            allowed=allowed,
            keys_scored=scored,
            slots=slots,
            share_scored=sum(scored.values()) / allowed if allowed else 0.0,
            candidates=candidates,
            lift=mean_recall / chance if chance else 1.0,
            recall_per_head=_mean_per_head(recall, counts, empty=1.0),
            attention_mass_per_head=_mean_per_head(mass, counts, empty=1.0),
            output_error_per_head=_mean_per_head(error, counts, empty=0.0),
        )


def _mean(x: Tensor, where: Tensor, empty: float = 0.0) -> float:
    return float(x[where].mean()) if bool(where.any()) else empty


def _mean_per_head(x: Tensor, where: Tensor, empty: float) -> Tensor:
    total = where.sum(-1)
    return torch.where(total > 0, torch.where(where, x, 0.0).sum(-1) / total.clamp(min=1), empty)


def _quantile(x: Tensor, where: Tensor, share: float, empty: float) -> float:
    picked = x[where].numpy()
    return float(np.quantile(picked, share)) if picked.size else empty
