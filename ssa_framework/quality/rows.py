"""Attention of some queries over the keys of a graph, beside their dense attention: what all figures are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.key_lists import in_band, mark
from ssa_framework.ops.summarize_keys import summarize_keys

_CHUNK_ELEMENTS = 2**22
"""Scores of one chunk of queries, over batch, heads and keys; a handful of tensors of that size live at a time."""
_GATHERED_ELEMENTS = 2**23
"""Of the values of kept keys that are gathered at a time."""


def row_chunks(query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """Rows of the queries ``[B, H, N, D]`` in pieces for which `DenseRows` stay small, int64 ``[T]`` each."""
    step = max(1, _CHUNK_ELEMENTS // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    return iter(torch.arange(query.shape[2], device=query.device).split(step))


@dataclass(frozen=True)
class DenseRows:
    """Dense attention of T queries over all keys that a mask allows, in float32, or float64 for float64.

    Attributes:
        scores: ``[B, H, T, M]``, scaled, biases included; -inf where the key is not allowed.
        values: ``[B, Hkv, M, Dv]``; zeros in the padding.
        lse: ``[B, H, T]``; -inf where nothing is allowed.
        out: ``[B, H, T, Dv]``.
        allowed: keys per query, int64 ``[B, H, T]``.
    """

    scores: Tensor
    values: Tensor
    lse: Tensor
    out: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mask: EdgeMask, scale: float | None = None) -> DenseRows:
        """Memory is that of a few tensors like `scores`.

        Args:
            query: ``[B, H, T, D]``. key: ``[B, Hkv, M, D]``. value: ``[B, Hkv, M, Dv]``.
            mask: of these T queries.
            scale: of the scores, ``1 / sqrt(D)`` if left out.
        """
        compute = compute_dtype(query)
        values = value.to(compute)
        if mask.key_keep is not None:  # zero weight times a NaN in the padding would still be NaN
            values = values.masked_fill(~mask.key_keep[:, None, :, None], 0.0)
        scores = _products(query.to(compute) * _scale(query, scale), key.to(compute))
        every_key = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
        every_key = every_key.expand(query.shape[0], 1, query.shape[2], -1)
        allowed = mask.structural(every_key)
        bias = mask.explicit_bias(every_key, query.shape[1])
        if bias is not None:
            allowed = allowed & (bias > float("-inf"))
            scores = scores + torch.where(allowed, bias, 0.0)
        allowed = allowed.expand_as(scores)
        scores = scores.masked_fill(~allowed, float("-inf"))
        lse = scores.logsumexp(-1)
        out = _weighted_values((scores - _finite(lse)[..., None]).exp(), values)
        return cls(scores, values, lse, out, allowed.sum(-1))

    def best(self, count: int) -> BestKeys:
        """The ``count`` allowed keys with the highest scores of each query; all where there are fewer."""
        return _best(self.scores, self.allowed, count)

    def best_outside(self, covered: Tensor, count: int) -> BestKeys:
        """The same without the keys that are ``covered``, bool, broadcastable with `scores`."""
        outside = (self.scores > float("-inf")) & ~covered
        return _best(self.scores.masked_fill(~outside, float("-inf")), outside.sum(-1), count)

    def output_over(self, graph: NeighborGraph, summaries: SummaryTensors | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the edges of a graph of these T queries, and over the summaries that they attend, as products
        with all keys: where there are many neighbors and only the output matters, faster than `keep_graph`.

        Returns: the output ``[B, H, T, Dv]``, zeros for a query that attends nothing; neighbors, and summaries, per
        query, int64 ``[B, H, T]``.
        """
        members = mark(graph.edge_keys(), self.scores.shape[-1]).expand(graph.batch, graph.graph_heads, -1, -1)
        members = members.repeat_interleave(graph.num_heads // graph.graph_heads, dim=1)
        degree = members.sum(-1)
        scores = self.scores.masked_fill(~members, float("-inf"))
        if summaries is None:
            weights = (scores - _finite(scores.logsumexp(-1))[..., None]).exp()
            return _weighted_values(weights, self.values), degree, torch.zeros_like(degree)
        seen = graph.summary_mask()
        of_summaries = summaries.scores.masked_fill(~seen, float("-inf"))
        total = _finite(torch.logaddexp(scores.logsumexp(-1), of_summaries.logsumexp(-1)))[..., None]
        out = _weighted_values((scores - total).exp(), self.values)
        return out + _weighted_values((of_summaries - total).exp(), summaries.values), degree, seen.sum(-1)

    def keep(self, keys: Tensor) -> KeptRows:
        """Attention over ``keys``, integer ``[B, H, T, E]``, each once, -1 = none."""
        place = keys.clamp(min=0).long()
        scores = self.scores.gather(-1, place).masked_fill(keys < 0, float("-inf"))
        return KeptRows(self, place, scores, *_no_summaries(scores, self.values))

    def keep_graph(self, graph: NeighborGraph, summaries: SummaryTensors | None) -> KeptRows:
        """Attention over the edges of a graph of these T queries, and over the summaries that they attend."""
        keys = graph.edge_keys().expand(graph.batch, graph.graph_heads, -1, -1)
        kept = self.keep(keys.repeat_interleave(graph.num_heads // graph.graph_heads, dim=1))
        if summaries is None:
            return kept
        seen = graph.summary_mask()
        return KeptRows(
            self, kept.keys, kept.scores, summaries.scores.masked_fill(~seen, float("-inf")), summaries.values
        )


@dataclass(frozen=True)
class BestKeys:
    """The allowed keys with the highest scores. Keys that tie for the last place are interchangeable.

    Attributes:
        keys: int64 ``[B, H, T, K]``, the best first; what stands behind the `wanted` first ones means nothing.
        threshold: the lowest of their scores, ``[B, H, T, 1]``.
        wanted: how many they are, int64 ``[B, H, T]``: K, or all allowed keys.
        room: how many of them score exactly the threshold, int64 ``[B, H, T]``.
    """

    keys: Tensor
    threshold: Tensor
    wanted: Tensor
    room: Tensor


@dataclass(frozen=True)
class KeptRows:
    """What T queries attend to. Further arguments named ``members`` are bool like `scores`: only these keys count.

    Attributes:
        dense: attention of the same queries over everything.
        keys: int64 ``[B, H, T, E]``. scores: the same shape; -inf = none.
        summary_scores: ``[B, H, T, C]``; -inf = not attended. summary_values: ``[B, Hkv, C, Dv]``.
    """

    dense: DenseRows
    keys: Tensor
    scores: Tensor
    summary_scores: Tensor
    summary_values: Tensor

    def degree(self, members: Tensor | None = None) -> Tensor:
        """Neighbors per query, int64 ``[B, H, T]``."""
        return (self._scores(members) > float("-inf")).sum(-1)

    def summaries(self) -> Tensor:
        """Summaries per query, int64 ``[B, H, T]``."""
        return (self.summary_scores > float("-inf")).sum(-1)

    def mass(self, members: Tensor | None = None) -> Tensor:
        """Share of the dense softmax weights on them, ``[B, H, T]``; 0 where nothing is allowed."""
        return (self._scores(members) - _finite(self.dense.lse)[..., None]).exp().sum(-1)

    def recall(self, best: BestKeys, members: Tensor | None = None) -> Tensor:
        """Share of the best keys that are among them, float64 ``[B, H, T]``; 0 where there are none."""
        scores = self._scores(members)
        hits = (scores > best.threshold).sum(-1)
        tied = ((scores == best.threshold) & (scores > float("-inf"))).sum(-1)
        hits = torch.where(best.wanted > 0, hits + torch.minimum(best.room, tied), 0)
        return hits.double() / best.wanted.clamp(min=1)

    def outputs(self, members: list[Tensor | None], with_summaries: list[bool]) -> Tensor:
        """Attention over some of the keys, with or without the summaries, for several such choices at once.

        Returns: ``[V, B, H, T, Dv]``; zeros for a query that attends nothing.
        """
        logits = torch.stack([self._scores(some) for some in members])  # [V, B, H, T, E]
        total = logits.logsumexp(-1)
        of_summaries = self.summary_scores.logsumexp(-1)
        choice = torch.tensor(with_summaries, device=total.device).view(-1, 1, 1, 1)
        total = torch.where(choice, torch.logaddexp(total, of_summaries), total)
        out = self._gathered_product((logits - _finite(total)[..., None]).exp())
        if self.summary_scores.shape[-1]:
            share = (of_summaries - _finite(total)).exp() * choice
            weights = (self.summary_scores - _finite(of_summaries)[..., None]).exp()
            out = out + share[..., None] * _weighted_values(weights, self.summary_values)
        return out

    def errors(self, members: list[Tensor | None], with_summaries: list[bool]) -> tuple[Tensor, Tensor]:
        """``‖o − o_dense‖ / ‖o_dense‖`` and ``‖o − o_dense‖`` of `outputs`, ``[V, B, H, T]``."""
        difference = (self.outputs(members, with_summaries) - self.dense.out).norm(dim=-1)
        return torch.where(difference == 0, 0.0, difference / self.dense.out.norm(dim=-1)), difference

    def _scores(self, members: Tensor | None) -> Tensor:
        return self.scores if members is None else self.scores.masked_fill(~members, float("-inf"))

    def _gathered_product(self, weights: Tensor) -> Tensor:
        """``weights [V, B, H, T, E]`` by the values of the kept keys → ``[V, B, H, T, Dv]``."""
        batch, heads, _, width = self.keys.shape
        kv_heads, keys, dim = self.dense.values.shape[1:]
        table = self.dense.values.flatten(0, 2)  # [B · Hkv · M, Dv]
        kv_head = torch.arange(heads, device=table.device) // (heads // kv_heads)
        first = (torch.arange(batch, device=table.device)[:, None] * kv_heads + kv_head) * keys  # [B, H]
        place = (self.keys + first[..., None, None]).flatten(0, 2)  # [rows, E]
        flat = weights.flatten(1, 3).transpose(0, 1)  # [rows, V, E]
        step = max(1, _GATHERED_ELEMENTS // max(1, width * dim))
        pieces = [
            torch.bmm(w, table.index_select(0, p.flatten()).view(*p.shape, dim))
            for w, p in zip(flat.split(step), place.split(step), strict=True)
        ]
        return torch.cat(pieces).transpose(0, 1).unflatten(1, self.keys.shape[:3])


@dataclass(frozen=True)
class SummaryTensors:
    """All summaries of a graph for T queries: ``scores [B, H, T, C]`` with the logarithms of their sizes, whether a
    query attends them or not, and ``values [B, Hkv, C, Dv]``."""

    scores: Tensor
    values: Tensor


@dataclass(frozen=True)
class SummaryMeans:
    """Mean keys, mean values and logarithms of sizes of the summaries of a graph."""

    keys: Tensor
    values: Tensor
    log_sizes: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, graph: NeighborGraph) -> SummaryMeans | None:
        """``key [B, Hkv, M, D]``, ``value [B, Hkv, M, Dv]``; ``None`` for a graph without summaries."""
        if graph.summaries is None:
            return None
        compute = compute_dtype(key)
        values = value.to(compute)
        if graph.mask.key_keep is not None:
            values = values.masked_fill(~graph.mask.key_keep[:, None, :, None], 0.0)
        return cls(*summarize_keys(key.to(compute), values, graph.summaries.members, graph.summaries.count))

    def rows(self, query: Tensor, scale: float | None = None) -> SummaryTensors:
        """For the queries ``[B, H, T, D]``."""
        scores = _products(query.to(self.keys.dtype) * _scale(query, scale), self.keys)
        weight = self.log_sizes.repeat_interleave(query.shape[1] // self.log_sizes.shape[1], dim=1)
        return SummaryTensors(scores + weight[:, :, None], self.values)


def covered_keys(graph: NeighborGraph) -> Tensor:
    """Whether band or columns reach each key, bool ``[B or 1, 1, N, M]``. For small sizes."""
    every_key = torch.arange(graph.num_keys, dtype=torch.int32, device=graph.device)
    return in_fixed_part(every_key.expand(1, 1, graph.num_queries, -1), graph)


def in_fixed_part(keys: Tensor, graph: NeighborGraph) -> Tensor:
    """Whether band or columns reach each of ``keys [B or 1, X, N, C]``; bool, broadcastable with them."""
    covered = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=keys.device)
    if graph.band is not None:
        covered = covered | in_band(keys, graph.mask.positions, graph.band)
    if graph.columns is not None:
        covered = covered | torch.isin(keys, graph.columns)
    return covered


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """``[B, H, T, D]`` by ``[B, Hkv, M, D]`` → ``[B, H, T, M]``."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    return (grouped.flatten(2, 3) @ keys.mT).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """``[B, H, T, M]`` by ``[B, Hkv, M, Dv]`` → ``[B, H, T, Dv]``."""
    grouped = weights.unflatten(1, (values.shape[1], -1))
    return (grouped.flatten(2, 3) @ values).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _best(scores: Tensor, allowed: Tensor, count: int) -> BestKeys:
    wanted = allowed.clamp(max=count)
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    threshold = best.values.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    above = (best.values > threshold).sum(-1)
    return BestKeys(best.indices, threshold, wanted, wanted - above)


def _no_summaries(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty((*scores.shape[:-1], 0)), values.new_empty((*values.shape[:2], 0, values.shape[3]))


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == float("-inf"), 0.0, lse)  # no neighbor: no weight, rather than NaN
