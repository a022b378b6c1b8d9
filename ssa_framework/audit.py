"""How much attention mass a neighbor graph misses, estimated while it is attended to.

For a query, Z_S is the sum of ``exp(score)`` over its neighbors, which is computed, and Z_R the same sum over the n
keys that it may attend but does not. A random sample of m of these gives the unbiased estimate
``n / m · Σ exp(score)`` of Z_R (the estimator of vAttention, Desai et al., 2025). The missed mass is
``Z_R / (Z_S + Z_R)``; as a function of the estimate of Z_R it is biased by a term of order 1 / m, which is estimated
and removed. The mean over a random sample of the queries then estimates the mean over all queries, and the spread
between the sampled queries, in which both samples show, gives Student's interval.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ssa_framework.config import AuditOptions
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.hookspecs import hookimpl
from ssa_framework.source import LayerSpec

_SCAN = 4
"""Products with all keys are made where they are at most so many times as many as those that are needed: a product of
matrices is about that much faster than one of gathered keys."""


@dataclass(frozen=True)
class AuditReport:
    """Of one call of one layer, or of several, see `combine_audits`.

    Attributes:
        layer: its name; empty where it has none.
        missed_mass: estimate of the share of the dense softmax weights that lies on keys that are no neighbors; mean
            over batch, heads and queries. Summaries of such keys count as missed.
        low, high: the interval of its confidence, within [0, 1]; all of [0, 1] for a single query.
        standard_error: of the estimate; infinite for a single query.
        confidence: of the interval.
        queries: how many were looked at. keys: how many keys that are no neighbors were, per query and head, mean.
        seconds: that it took.
    """

    layer: str
    missed_mass: float
    low: float
    high: float
    standard_error: float
    confidence: float
    queries: int
    keys: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``None`` for an infinite standard error."""
        values = asdict(self)
        return {name: None if value == math.inf else value for name, value in values.items()}


@torch.no_grad()
def audit_graph(
    query: Tensor,
    key: Tensor,
    graph: NeighborGraph,
    *,
    options: AuditOptions | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    layer: str = "",
) -> AuditReport | None:
    """Estimate the attention mass that a graph misses.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``. graph: built for them.
        options: what is drawn; `AuditOptions()` if left out.
        scale: of the scores, ``1 / sqrt(D)`` if left out.
        generator: of what is drawn, on the CPU; seeded with ``options.seed`` if left out.
        layer: what the report calls it.

    Returns: ``None`` where there is no query or no key.
    """
    started = time.perf_counter()
    options = AuditOptions() if options is None else options
    batch, _, length = query.shape[:3]
    if not batch * length * key.shape[2]:
        return None
    if generator is None:
        generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(length, generator=generator)[: options.queries].sort().values
    rows = drawn.to(query.device)
    if graph.is_full:
        missed, looked_at = torch.zeros(len(rows)), 0.0
    else:
        missed, looked_at = _missed(query[:, :, rows], key, graph.pick(rows), options.keys, scale, generator)
    error = math.inf if len(missed) == 1 else float(missed.std()) / math.sqrt(len(missed))
    if graph.is_full or (options.keys is None and len(missed) == length):
        error = 0.0  # nothing was left to chance
    elif options.keys is None:
        error *= math.sqrt(1.0 - len(missed) / length)
    return _report(
        layer, float(missed.mean()), error, options.confidence, len(missed), looked_at, time.perf_counter() - started
    )


def combine_audits(reports: Iterable[AuditReport]) -> AuditReport:
    """Of several calls or layers, weighted by their queries; seconds are summed. What was drawn in each must be
    independent of what was drawn in the others, as it is between calls of a layer.

    Raises:
        ConfigError: no report.
    """
    found = list(reports)
    if not found:
        raise ConfigError("there is no report to combine")
    queries = sum(r.queries for r in found)
    share = [r.queries / queries for r in found]
    mean = sum(w * r.missed_mass for w, r in zip(share, found, strict=True))
    error = math.sqrt(sum((w * r.standard_error) ** 2 for w, r in zip(share, found, strict=True)))
    names = {r.layer for r in found}
    keys = sum(w * r.keys for w, r in zip(share, found, strict=True))
    name = names.pop() if len(names) == 1 else ""
    freedom = max(1, queries - len(found))
    return _report(name, mean, error, found[0].confidence, queries, keys, sum(r.seconds for r in found), freedom)


class MissMonitor:
    """A plugin that calls back when layers miss more attention mass than they should.

    Register it (`SourceRegistry.register_plugin`); it sees every audit of the layers that use that registry.

    Args:
        limit: most missed mass that is accepted, a share.
        on_miss: called with the combined report of the last audits of a layer when the lower end of its interval lies
            above ``limit``. The audits of that layer are counted anew afterwards, since it may change the layer.
        window: how many audits of a layer are combined.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, limit: float, on_miss: Callable[[AuditReport], object], window: int = 8) -> None:
        if not 0.0 <= limit < 1.0:
            raise ConfigError(f"limit is a share in [0, 1), got {limit!r}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigError(f"window must be an integer >= 1, got {window!r}")
        self.limit = limit
        self.on_miss = on_miss
        self._last: dict[str, deque[AuditReport]] = defaultdict(lambda: deque(maxlen=window))

    @hookimpl
    def ssa_graph_audited(self, report: AuditReport, layer: LayerSpec) -> None:
        held = self._last[report.layer]
        held.append(report)
        combined = combine_audits(held)
        if combined.low > self.limit:
            held.clear()
            self.on_miss(combined)

    def reports(self) -> dict[str, AuditReport]:
        """The combined last audits of every layer, by its name."""
        return {name: combine_audits(held) for name, held in self._last.items() if held}


def _missed(
    query: Tensor, key: Tensor, graph: NeighborGraph, count: int | None, scale: float | None, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Missed mass of each query of ``graph``, mean over batch and heads, float64 ``[T]`` on the CPU; and how many keys
    that are no neighbors were looked at, mean."""
    batch, heads, rows = query.shape[:3]
    keys = key.shape[2]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaled = query.to(compute) * (query.shape[-1] ** -0.5 if scale is None else scale)
    neighbors = graph.edge_keys()
    per_head = graph.mask.per_head or graph.mask.mask_mod is not None
    shape = (batch, heads if per_head else graph.graph_heads, rows)
    neighbors = neighbors.expand(batch, graph.graph_heads, -1, -1)
    if shape[1] > graph.graph_heads:
        neighbors = neighbors.repeat_interleave(shape[1] // graph.graph_heads, dim=1)
    every_key = torch.arange(keys, dtype=torch.int32, device=key.device).expand(1, 1, rows, -1)
    bias = graph.mask.explicit_bias(every_key, heads)
    allowed = graph.mask.structural(every_key)
    if bias is not None:
        allowed = allowed & (bias > float("-inf"))
    selected = torch.zeros((*shape, keys + 1), dtype=torch.bool, device=key.device)
    selected.scatter_(-1, torch.where(neighbors < 0, keys, neighbors).long(), True)
    rest = allowed & ~selected[..., :keys]  # [B, X, T, M]
    left = rest.sum(-1)
    scan = count is None or keys <= _SCAN * (neighbors.shape[-1] + count)
    scores = _products(scaled, key.to(compute)) if scan else None
    if scores is not None and bias is not None:
        scores = scores + torch.where(allowed, bias, 0.0).to(compute)

    def scores_of(places: Tensor) -> Tensor:
        """Of keys ``[B, X, T, C]``: ``[B, H, T, C]``."""
        places = places.repeat_interleave(heads // places.shape[1], dim=1)
        if scores is not None:
            return scores.gather(-1, places)
        found = _gathered_products(scaled, key, places)
        extra = graph.mask.explicit_bias(places.int(), heads)
        return found if extra is None else found + torch.nan_to_num(extra, neginf=0.0).to(compute)

    def by_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    kept = scores_of(neighbors.clamp(min=0).long()).masked_fill(by_head(neighbors < 0), float("-inf"))
    kept_lse = kept.logsumexp(-1)  # [B, H, T]
    if count is None:
        assert scores is not None
        missed_lse = scores.masked_fill(~by_head(rest), float("-inf")).logsumexp(-1)
        mass = torch.sigmoid(missed_lse - kept_lse)
        looked_at = left.double().mean()
    else:
        places, valid = _draw(rest, left, count, generator)
        sampled = scores_of(places).masked_fill(~by_head(valid), float("-inf"))
        # relative to the neighbors; a query without any misses everything
        weights = (sampled - kept_lse[..., None]).double().exp()
        number = by_head(left).double()
        ratio = number * weights.mean(-1)
        spread = number.square() * weights.diff(dim=-1).square().mean(-1) / (2 * count)  # neighbors in the sample
        mass = torch.where(ratio.isfinite(), ratio / (1 + ratio) + spread / (1 + ratio) ** 3, 1.0)
        looked_at = left.clamp(max=count).double().mean()
    mass = torch.where(by_head(left) > 0, torch.nan_to_num(mass.double(), nan=0.0), 0.0)
    return mass.mean(dim=(0, 1)).cpu(), float(looked_at)


def _draw(rest: Tensor, left: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` of the keys of ``rest [B, X, T, M]``, of which each row has ``left``: one from each of as many equal
    stretches of them, so that every key has the same chance. Positions ``[B, X, T, count]``, and whether there is one.
    """
    draws = torch.rand((*left.shape, count), generator=generator, dtype=torch.float64).to(left.device)
    stretch = torch.arange(count, device=left.device) + draws
    ranks = (stretch * (left[..., None] / count)).floor().clamp(max=(left[..., None] - 1).clamp(min=0)) + 1
    order = rest.expand(*left.shape, -1).to(torch.int32).cumsum(-1, dtype=torch.int32)
    places = torch.searchsorted(order, ranks.to(torch.int32)).clamp(max=rest.shape[-1] - 1)
    return places, (left > 0)[..., None].expand_as(places)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """``[B, H, T, D]`` by ``[B, Hkv, M, D]`` → ``[B, H, T, M]``."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    return (grouped.flatten(2, 3) @ keys.mT).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _gathered_products(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """``[B, H, T, D]`` by the keys at ``places [B, H, T, C]`` → ``[B, H, T, C]``; a head and a query at a time."""
    batch, heads, rows, count = places.shape
    group = heads // keys.shape[1]
    found = queries.new_empty((batch, heads, rows, count))
    for b in range(batch):
        for h in range(heads):
            gathered = keys[b, h // group].index_select(0, places[b, h].flatten()).view(rows, count, -1)
            found[b, h] = torch.bmm(gathered.to(queries.dtype), queries[b, h, :, :, None])[..., 0]
    return found


def _report(
    layer: str,
    mean: float,
    error: float,
    confidence: float,
    queries: int,
    keys: float,
    seconds: float,
    freedom: int | None = None,
) -> AuditReport:
    freedom = max(1, queries - 1) if freedom is None else freedom
    half = student_quantile(0.5 + confidence / 2, freedom) * error if math.isfinite(error) else 1.0
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    return AuditReport(layer, min(1.0, max(0.0, mean)), low, high, error, confidence, queries, keys, seconds)


def student_quantile(probability: float, freedom: int) -> float:
    """Of Student's distribution; exact for 1 and 2 degrees of freedom, else by the expansion of Cornish and Fisher
    (Abramowitz and Stegun, 26.7.5), which is off by less than 2 % for 3 and 0.1 % from 8 on, at 97.5 %."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
