"""Source mixes side by side: what each keeps of dense attention, how many keys it looks at, how long it takes."""

from __future__ import annotations

import csv
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_framework.attention import sparse_attention
from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.laboratory.capture import LayerTensors
from ssa_framework.laboratory.files import replace_json
from ssa_framework.laboratory.routing import MixRouter, routing_config, sample_queries
from ssa_framework.masks import make_edge_mask
from ssa_framework.quality.bench import LARGEST_DIFFERENCE, environment, score_rounding
from ssa_framework.quality.exactness import output_difference
from ssa_framework.quality.measure import QualityReport, measure_graphs
from ssa_framework.quality.rows import DenseRows, row_chunks
from ssa_framework.quality.timing import Timing, time_alternating
from ssa_framework.registry import SourceRegistry

EXACT_AT = (16, 32, 64, 128, 256, 512, 1024)
"""Numbers of keys for which the exact top-K is the yardstick."""

_CHECKED_QUERIES = 64
_CHECK_ELEMENTS = 2**23  # scores of the exact computation, float64, stored several times

Cost = Literal["keys_looked_at", "keys_scored", "keys_attended", "times_dense"]


@dataclass(frozen=True)
class Quality:
    """What is kept of dense attention, and the keys it took: means over layers of what `measure` says of each.

    Attributes:
        recall, recall_beyond, attention_mass, output_error, output_error_p95, output_error_total: see `QualityReport`;
            ``recall_beyond`` is ``None`` where no layer has one.
        keys_scored: keys per query whose ``q·k`` was computed, all sources together.
        keys_attended: neighbors per query. summaries: summaries per query.
        keys_looked_at: keys per query that were scored or attended without being scored, and summaries.
    """

    recall: float
    recall_beyond: float | None
    attention_mass: float
    output_error: float
    output_error_p95: float
    output_error_total: float
    keys_scored: float
    keys_attended: float
    summaries: float
    keys_looked_at: float

    @classmethod
    def of(cls, reports: Sequence[QualityReport]) -> Quality:
        """Means over the reports of several layers."""

        def mean(pick: Callable[[QualityReport], float]) -> float:
            return _number(sum(map(pick, reports)) / len(reports))

        beyond = [report.recall_beyond for report in reports if report.recall_beyond is not None]
        return cls(
            recall=mean(lambda r: r.recall),
            recall_beyond=_number(sum(beyond) / len(beyond)) if beyond else None,
            attention_mass=mean(lambda r: r.attention_mass),
            output_error=mean(lambda r: r.output_error),
            output_error_p95=mean(lambda r: r.output_error_p95),
            output_error_total=mean(lambda r: r.output_error_total),
            keys_scored=mean(lambda r: sum(r.keys_scored.values())),
            keys_attended=mean(lambda r: r.degree),
            summaries=mean(lambda r: r.summaries),
            keys_looked_at=mean(lambda r: r.candidates + r.summaries),
        )


@dataclass(frozen=True)
class Times:
    """Seconds of one layer, all its queries, measured in turns with dense attention; medians and quartiles.

    Attributes:
        index: routing a single query, the last one, among all keys: whatever does not grow with the number of queries,
            such as sorting hashes, clustering keys, or training and filling a search index.
        route: routing all queries, `index` included.
        attend: attention over the graph.
        dense: torch's dense attention.
    """

    index: Timing
    route: Timing
    attend: Timing
    dense: Timing

    @property
    def search(self) -> float:
        """Median time of routing beyond `index`; at least 0."""
        return max(0.0, self.route.median - self.index.median)

    @property
    def total(self) -> float:
        """Median time of routing and attention together."""
        return (self.route + self.attend).median

    @property
    def times_dense(self) -> float:
        """Dense time / sparse time: above 1, sparse is faster."""
        return self.dense.median / self.total

    def as_dict(self) -> dict[str, Any]:
        names = ("index", "route", "attend", "dense")
        derived = {"search_s": self.search, "total_s": self.total, "times_dense": self.times_dense}
        return {**{name: getattr(self, name).to_dict() for name in names}, **derived}


@dataclass(frozen=True)
class MixResult:
    """One mix.

    Attributes:
        name: of the mix. config: its configuration as JSON values.
        quality: means over layers. per_layer: what `measure` says of each, by layer index.
        times: ``None`` where nothing was timed, or the output was wrong.
        output_difference: of sparse attention from dense attention under the mask of its graph; see
            `ssa_framework.quality.output_difference`. ``None`` where nothing was timed.
        message: why there is no time, if the output was wrong.
    """

    name: str
    config: Mapping[str, Any]
    quality: Quality
    per_layer: Mapping[int, QualityReport]
    times: Times | None = None
    output_difference: float | None = None
    message: str = ""

    def cost(self, cost: Cost) -> float | None:
        """Of one kind; time as sparse time / dense time, so that less is cheaper everywhere."""
        if cost == "times_dense":
            return None if self.times is None else 1.0 / self.times.times_dense
        return float(getattr(self.quality, cost))

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "config": dict(self.config),
            "quality": asdict(self.quality),
            "per_layer": {str(layer): report.to_dict() for layer, report in self.per_layer.items()},
            "times": None if self.times is None else self.times.as_dict(),
            "output_difference": self.output_difference,
            "message": self.message,
        }


@dataclass(frozen=True)
class ExactResult:
    """The exact best keys of every query, nothing else: no other keys, as many as these, hold more attention mass.

    Attributes:
        keys: how many. quality: means over layers; every key counts as scored.
    """

    keys: int
    quality: Quality


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Attributes:
        data: where queries, keys and values come from. layers: their indices. timed_layer: whose time it is.
        length, heads, kv_heads, head_dim, causal: of the layer that is timed.
        allowed: keys per query that it may attend: what dense attention looks at.
        mixes: in the order that they were given. exact: the yardstick, by ascending number of keys.
        queries, first_query, recall_at, seed: of the sample that quality is measured on.
        threads: of the timing. dtype: of the tensors.
        seconds: that it took. complete: whether nothing was interrupted.
        environment: device, versions, commit and date.
    """

    data: str
    layers: tuple[int, ...]
    timed_layer: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    allowed: float
    mixes: tuple[MixResult, ...]
    exact: tuple[ExactResult, ...]
    queries: int
    first_query: int
    recall_at: int
    seed: int
    threads: int
    dtype: str
    seconds: float
    complete: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def pareto(self, cost: Cost = "keys_looked_at") -> list[MixResult]:
        """The mixes that no other one beats: none has less of both this cost and the output error. By rising cost."""
        priced = [(mix.cost(cost), mix.quality.output_error, mix) for mix in self.mixes]
        known = sorted(((c, error, mix) for c, error, mix in priced if c is not None), key=lambda entry: entry[:2])
        front: list[MixResult] = []
        best = float("inf")
        for _, error, mix in known:
            if error < best:
                front.append(mix)
                best = error
        return front

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        own = {name: value for name, value in vars(self).items() if name not in ("mixes", "exact")}
        return {
            **own,
            "layers": list(self.layers),
            "environment": dict(self.environment),
            "mixes": [mix.as_dict() for mix in self.mixes],
            "exact": [{"keys": e.keys, "quality": asdict(e.quality)} for e in self.exact],
            "pareto": {cost: [mix.name for mix in self.pareto(cost)] for cost in ("keys_looked_at", "times_dense")},
        }

    def write_json(self, path: str | Path) -> None:
        """Write `as_dict`; the file is replaced at once."""
        replace_json(path, self.as_dict())

    def rows(self) -> list[dict[str, Any]]:
        """One row per mix, one per number of exact keys, and one of dense attention, with the same columns."""
        dense = Quality(1.0, None, 1.0, 0.0, 0.0, 0.0, self.allowed, self.allowed, 0.0, self.allowed)
        rows = [
            *(self._row("mix", mix.name, mix.quality, mix.times, mix.config["num_neighbors"]) for mix in self.mixes),
            *(self._row("exact", f"exact top-{e.keys}", e.quality, None, e.keys) for e in self.exact),
            self._row("dense", "dense", dense, None, None),
        ]
        for row, mix in zip(rows, self.mixes, strict=False):
            row["sources"] = json.dumps(SSAConfig.from_dict(mix.config).source_mix, default=repr)
            row["message"] = mix.message
        return rows

    def _row(
        self, kind: str, name: str, quality: Quality, times: Times | None, neighbors: int | None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": kind, "name": name, "num_neighbors": neighbors, **asdict(quality)}
        medians = {
            "index_ms": None if times is None else times.index.median,
            "search_ms": None if times is None else times.search,
            "attend_ms": None if times is None else times.attend.median,
            "total_ms": None if times is None else times.total,
            "dense_ms": None if times is None else times.dense.median,
        }
        row |= {column: None if value is None else _number(1e3 * value) for column, value in medians.items()}
        return row | {
            "times_dense": None if times is None else _number(times.times_dense),
            "layers": len(self.layers),
            "length": self.length,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "queries": self.queries,
            "first_query": self.first_query,
            "recall_at": self.recall_at,
            "seed": self.seed,
            "threads": self.threads,
            "dtype": self.dtype,
            "data": self.data,
            "sources": "",
            "message": "",
            **self.environment,
        }

    def write_csv(self, path: str | Path) -> None:
        """Write `rows`; what is missing stays empty."""
        rows = self.rows()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def compare(
    layers: Sequence[LayerTensors],
    mixes: Mapping[str, SSAConfig],
    *,
    queries: int = 256,
    first_query: int = 0,
    recall_at: int = 32,
    exact_at: Sequence[int] = EXACT_AT,
    seed: int = 0,
    timed: bool = True,
    seconds: float = 1.0,
    threads: int | None = None,
    data: str = "",
    registry: SourceRegistry | None = None,
    on_stage: Callable[[str], object] | None = None,
) -> Comparison:
    """Measure mixes on the same queries, keys and values.

    Quality is that of a sample of the queries of all layers, routed among all keys. Time is that of all queries of the
    middle layer, in turns with dense attention; a mix whose output is not that of dense attention under the mask of
    its graph gets no time. Interrupted with Ctrl-C while it times, it returns what it has.

    Args:
        layers: what to compare on; see `capture_layers`, `load_layers` and `synthetic_layer`.
        mixes: configurations by name; their sizes and ``dense_below`` are not used.
        queries, first_query, recall_at, seed: as in `inspect_model`.
        exact_at: for how many exact best keys quality is measured as a yardstick; those beyond the length are left out.
        timed: whether to take times at all.
        seconds: of readings for each mix, three rounds at least.
        threads: torch's intra-op threads while timing; unchanged if left out.
        data: what the result calls the data.
        registry: where source names are looked up.
        on_stage: told what comes next; `stages` says how many times that is.

    Raises:
        ConfigError: no layer, no mix, or a number out of range. SSAError: whatever sources and router raise.
    """
    started = time.perf_counter()
    if not layers or not mixes:
        raise ConfigError(f"compare needs a layer and a mix, got {len(layers)} layers and {len(mixes)} mixes")
    threads = torch.get_num_threads() if threads is None else threads
    stage = on_stage if on_stage is not None else lambda _: None
    routers = {name: MixRouter(config, registry) for name, config in mixes.items()}
    for layer in layers:
        layer.require_finite()
        for router in routers.values():
            router.prepare(layer)
    exact_at = sorted({count for count in exact_at if count < max(layer.length for layer in layers)})
    reports: dict[str, dict[int, QualityReport]] = {name: {} for name in routers}
    exact: dict[int, list[QualityReport]] = {count: [] for count in exact_at}
    for layer in layers:
        rows = sample_queries(layer, queries, first_query=first_query, seed=seed)
        graphs = {}
        for name, router in routers.items():
            stage(f"layer {layer.layer}: {name}")
            graphs[name] = router.route(layer, rows).graph
        stage(f"layer {layer.layer}: measuring")
        of_mixes, of_exact = measure_layer(layer, rows, graphs, exact_at=exact_at, recall_at=recall_at)
        for name, report in of_mixes.items():
            reports[name][layer.layer] = report
        for count, report in of_exact.items():
            exact[count].append(report)
    middle = layers[len(layers) // 2]
    results = {
        name: MixResult(name, mixes[name].to_dict(), Quality.of(list(by_layer.values())), by_layer)
        for name, by_layer in reports.items()
    }
    complete = True
    if timed:
        try:
            for name, router in routers.items():
                stage(f"time: {name}")
                results[name] = _with_times(results[name], router, middle, seconds, threads, seed)
        except KeyboardInterrupt:
            complete = False
    some_report = next(iter(next(iter(reports.values())).values()))
    return Comparison(
        data=data,
        layers=tuple(layer.layer for layer in layers),
        timed_layer=middle.layer,
        length=middle.length,
        heads=middle.q.shape[1],
        kv_heads=middle.k.shape[1],
        head_dim=middle.q.shape[3],
        causal=middle.causal,
        allowed=_number(some_report.allowed),
        mixes=tuple(results.values()),
        exact=tuple(ExactResult(count, _exact_quality(found)) for count, found in exact.items()),
        queries=min(queries, middle.length - first_query),
        first_query=first_query,
        recall_at=recall_at,
        seed=seed,
        threads=threads,
        dtype=str(middle.q.dtype).removeprefix("torch."),
        seconds=_number(time.perf_counter() - started),
        complete=complete,
        environment=environment(str(middle.q.device)),
    )


def stages(layers: int, mixes: int, timed: bool) -> int:
    """How often `compare` tells ``on_stage`` what comes next."""
    return layers * (mixes + 1) + (mixes if timed else 0)


def measure_layer(
    layer: LayerTensors,
    rows: Tensor,
    graphs: Mapping[str, NeighborGraph],
    *,
    exact_at: Sequence[int] = (),
    recall_at: int = 32,
) -> tuple[dict[str, QualityReport], dict[int, QualityReport]]:
    """What graphs of the queries ``rows`` of a layer keep of dense attention, and what the exact best keys of the same
    queries keep, by their number."""
    every: dict[str | int, NeighborGraph] = dict(graphs.items())
    every |= exact_graphs(layer, rows, exact_at).items()
    reports = measure_graphs(
        layer.q[:, :, rows], layer.k, layer.v, every, recall_at=recall_at, sample=len(rows), scale=layer.scale
    )
    return {name: reports[name] for name in graphs}, {count: reports[count] for count in exact_at}


@torch.no_grad()
def exact_graphs(layer: LayerTensors, rows: Tensor, counts: Sequence[int]) -> dict[int, NeighborGraph]:
    """Graphs of the best keys of the queries ``rows``, by their number."""
    if not counts:
        return {}
    query = layer.q[:, :, rows]
    pieces = []
    for chunk in row_chunks(query, layer.k):
        mask = make_edge_mask(
            batch=query.shape[0],
            heads=query.shape[1],
            queries=len(chunk),
            keys=layer.length,
            device=query.device,
            causal=layer.causal,
            query_positions=rows[chunk],
        )
        best = DenseRows.of(query[:, :, chunk], layer.k, layer.v, mask, layer.scale).best(max(counts))
        slot = torch.arange(best.keys.shape[-1], device=query.device)
        pieces.append(torch.where(slot < best.wanted[..., None], best.keys, -1))
    keys = torch.cat(pieces, dim=2)
    return {
        count: NeighborGraph.from_lists(
            keys[..., :count], num_keys=layer.length, causal=layer.causal, query_positions=rows
        )
        for count in counts
    }


def _exact_quality(reports: Sequence[QualityReport]) -> Quality:
    allowed = _number(sum(report.allowed for report in reports) / len(reports))
    return replace(Quality.of(reports), keys_scored=allowed, keys_looked_at=allowed)


def _with_times(
    result: MixResult, router: MixRouter, layer: LayerTensors, seconds: float, threads: int, seed: int
) -> MixResult:
    """The result with times, if the output is right."""
    q, k, v, scale = layer.q, layer.k, layer.v, layer.scale
    config = routing_config(router.config, layer)
    every = torch.arange(layer.length, device=q.device)

    def attend(graph: NeighborGraph) -> Tensor:
        return sparse_attention(q, k, v, config=config, graph=graph, scale=scale, enable_gqa=True)

    graph = router.route(layer, every).graph
    sample = max(1, min(_CHECKED_QUERIES, _CHECK_ELEMENTS // (q.shape[0] * q.shape[1] * layer.length)))
    difference = output_difference(q, k, v, graph, attend(graph), sample=sample, seed=seed, scale=scale)
    accepted = LARGEST_DIFFERENCE[str(q.dtype).removeprefix("torch.")] + score_rounding(q, k)
    if not difference <= accepted:
        message = f"not dense attention under the graph's mask: differs by {difference:.2g}, accepted {accepted:.2g}"
        return replace(result, output_difference=difference if isfinite(difference) else None, message=message)
    contestants: dict[str, Callable[[], object]] = {
        "index": functools.partial(router.route, layer, every[-1:]),
        "route": functools.partial(router.route, layer, every),
        "attend": functools.partial(attend, graph),
        "dense": functools.partial(
            F.scaled_dot_product_attention, q, k, v, is_causal=layer.causal, scale=scale, enable_gqa=True
        ),
    }
    times = time_alternating(contestants, seconds=seconds, threads=threads)
    return replace(result, output_difference=_number(difference), times=Times(**times))


def _number(value: float) -> float:
    return float(f"{value:.6g}")
