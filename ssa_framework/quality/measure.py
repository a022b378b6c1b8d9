"""`measure`: what a neighbor graph keeps of dense attention, on a sample of its queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.ops.key_lists import in_band
from ssa_framework.ops.neighbor_attention.api import check_graph, check_tensors
from ssa_framework.ops.summarize_keys import summarize_keys
from ssa_framework.quality.sample import pick_queries, sample_rows

_CHUNK_ELEMENTS = 2**22
"""Scores of one chunk of queries, over batch, heads and keys; a handful of tensors of that size live at a time."""


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
    check_tensors(query, key, value)
    check_graph(query, key, graph)
    for name, number in (("recall_at", recall_at), ("sample", sample)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {number!r}")
    rows = sample_rows(graph.num_queries, sample, seed, query.device)
    tally = _Tally(graph.batch, graph.num_heads)
    if graph.num_keys and graph.batch:
        for chunk in _compare(query[:, :, rows], key, value, pick_queries(graph, rows), recall_at, scale):
            tally.add(chunk)
    return tally.report(graph, recall_at)


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
    query: Tensor, key: Tensor, value: Tensor, graph: NeighborGraph, recall_at: int, scale: float | None
) -> Iterator[_Chunk]:
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    keys, values = key.to(compute), value.to(compute)
    if graph.mask.key_keep is not None:  # zero weight times a NaN in the padding would still be NaN
        values = values.masked_fill(~graph.mask.key_keep[:, None, :, None], 0.0)
    pseudo_keys = pseudo_values = log_weight = None
    if graph.summaries is not None:
        some = graph.summaries
        pseudo_keys, pseudo_values, log_weight = summarize_keys(keys, values, some.members, some.count)
    step = max(1, _CHUNK_ELEMENTS // (graph.batch * graph.num_heads * graph.num_keys))
    for start in range(0, graph.num_queries, step):
        rows = torch.arange(start, min(start + step, graph.num_queries), device=query.device)
        piece = pick_queries(graph, rows)
        queries = query[:, :, rows].to(compute).unflatten(1, (key.shape[1], -1))  # [B, Hkv, g, T, D]
        scores = _scores(queries, keys) * scale
        summaries = None
        if pseudo_keys is not None and pseudo_values is not None and log_weight is not None:
            weight = log_weight.repeat_interleave(graph.num_heads // log_weight.shape[1], dim=1)
            summaries = _scores(queries, pseudo_keys) * scale + weight[:, :, None], pseudo_values
        yield _compare_rows(scores, values, summaries, piece, recall_at)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """``[B, Hkv, g, T, D]`` by ``[B, Hkv, M, D]`` → ``[B, H, T, M]``."""
    return (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, queries.shape[2:4]).flatten(1, 2)


def _compare_rows(
    scores: Tensor, values: Tensor, summaries: tuple[Tensor, Tensor] | None, graph: NeighborGraph, recall_at: int
) -> _Chunk:
    """``scores [B, H, T, M]``, ``values [B, Hkv, M, Dv]``, both of all summaries too, and the graph of the same T
    queries."""
    every_key = torch.arange(graph.num_keys, dtype=torch.int32, device=scores.device)
    every_key = every_key.expand(graph.batch, 1, scores.shape[2], -1)
    allowed = graph.mask.structural(every_key)
    bias = graph.mask.explicit_bias(every_key, graph.num_heads)
    if bias is not None:
        allowed = allowed & (bias > float("-inf"))
        scores = scores + torch.where(allowed, bias, 0.0)
    allowed = allowed.expand_as(scores)
    scores = torch.where(allowed, scores, float("-inf"))
    edges = graph.to_dense_mask()
    counts = allowed.sum(-1)

    fixed = _covered(every_key, graph)
    beyond = allowed & ~fixed
    beyond_scores = torch.where(beyond, scores, float("-inf"))
    beyond_counts = beyond.sum(-1)

    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(allowed, (scores - lse).exp(), 0.0)  # lse = -inf only where nothing is allowed
    kept = torch.where(edges, weights, 0.0)
    mass = kept.sum(-1)
    dense = _weighted_values(weights, values)
    kept_scores, kept_values = torch.where(edges, scores, float("-inf")), values
    seen = graph.summary_mask()
    if summaries is not None:
        of_summaries = torch.where(seen, summaries[0], float("-inf"))
        kept_scores = torch.cat([kept_scores, of_summaries], dim=-1)
        kept_values = torch.cat([values, summaries[1]], dim=2)
    sparse = _weighted_values((kept_scores - _finite_lse(kept_scores)).exp(), kept_values)
    difference, norm = (sparse - dense).norm(dim=-1), dense.norm(dim=-1)
    error = torch.where(difference == 0, 0.0, difference / norm)
    return _Chunk(
        counts=counts > 0,
        recall=_recall(scores, edges, counts, recall_at),
        beyond_counts=beyond_counts > 0,
        beyond=_recall(beyond_scores, edges & beyond, beyond_counts, recall_at),
        mass=mass,
        error=error,
        error_squared=difference.double().square(),
        norm_squared=norm.double().square(),
        degree=edges.sum(-1),
        summaries=seen.sum(-1),
        allowed=counts,
    )


def _finite_lse(scores: Tensor) -> Tensor:
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.where(lse == float("-inf"), 0.0, lse)  # no neighbor: no weight, rather than NaN


def _weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """``[B, H, T, M]`` by ``[B, Hkv, M, Dv]`` → ``[B, H, T, Dv]``."""
    grouped = weights.unflatten(1, (values.shape[1], -1))
    return (grouped.flatten(2, 3) @ values).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _covered(keys: Tensor, graph: NeighborGraph) -> Tensor:
    """Whether band or columns reach each of ``keys [B, 1, T, M]``."""
    covered = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=keys.device)
    if graph.band is not None:
        covered = covered | in_band(keys, graph.mask.positions, graph.band)
    if graph.columns is not None:
        covered = covered | torch.isin(keys, graph.columns)
    return covered


def _recall(scores: Tensor, edges: Tensor, counts: Tensor, recall_at: int) -> Tensor:
    """Share of the best ``min(recall_at, counts)`` keys that are edges, float64 ``[B, H, T]``; 0 where there is none.

    ``scores`` are -inf outside the keys that count, ``edges`` are False there. Ties at the threshold are resolved in
    favour of the edges: any set of k best keys is as good as another.
    """
    wanted = counts.clamp(max=recall_at)
    best = scores.topk(min(recall_at, scores.shape[-1]), dim=-1).values
    threshold = best.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    above = scores > threshold
    hits = (above & edges).sum(-1)
    room = wanted - above.sum(-1)
    tied = ((scores == threshold) & edges).sum(-1)
    return (hits + torch.minimum(room, tied)).double() / wanted.clamp(min=1)


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
