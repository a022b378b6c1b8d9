"""Audits of the attention mass that a graph misses: how often the interval holds the exact mass, and what they cost.

Coverage is on synthetic keys with topics; cost is CPU time of one thread, in turns with the forward pass of one layer
of a `SparseTransformer` with the preset "balanced". Writes one CSV row per graph and number of keys, and per length.

    python benchmarks/audit.py
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recall import commit

import ssa_framework
from ssa_framework import SparseTransformer, SSAConfig, build_graph
from ssa_framework.audit import audit_graph
from ssa_framework.config import AuditOptions
from ssa_framework.laboratory.capture import synthetic_layer
from ssa_framework.quality import measure

GRAPHS: dict[str, dict[str, Any]] = {
    "exact top-38": {"num_neighbors": 40, "sources": {"global": {"tokens": 2}, "topk": {}}},
    "window of 40": {"num_neighbors": 64, "sources": {"self": {}, "window": {"size": 40}}},
    "clusters": {"sources": {"clusters": {"levels": [[64, 8]], "keys": 32}}},
}
COLUMNS = [
    "what", "graph", "length", "queries", "keys", "audits", "confidence", "exact_mass", "mean_estimate",
    "standard_error", "covered_percent", "forward_cpu_ms", "audit_cpu_ms", "cost_percent", "version", "commit", "torch",
]  # fmt: skip


def coverage(graph_name: str, keys: int | None, audits: int) -> dict[str, Any]:
    layer = synthetic_layer("clustered", length=600, heads=4, kv_heads=2, head_dim=32, seed=1)
    q = 0.5 * layer.q
    graph = build_graph(q, layer.k, config=SSAConfig(dense_below=0, **GRAPHS[graph_name]), is_causal=True)
    exact = 1.0 - measure(q, layer.k, layer.v, graph, sample=layer.length).attention_mass
    options, generator = AuditOptions(queries=24, keys=keys), torch.Generator().manual_seed(7)
    found = [audit_graph(q, layer.k, graph, options=options, generator=generator) for _ in range(audits)]
    reports = [report for report in found if report is not None]
    means = [report.missed_mass for report in reports]
    covered = sum(report.low <= exact <= report.high for report in reports)
    return {
        "what": "coverage",
        "graph": graph_name,
        "length": layer.length,
        "queries": options.queries,
        "keys": "all" if keys is None else keys,
        "audits": audits,
        "confidence": options.confidence,
        "exact_mass": f"{exact:.4f}",
        "mean_estimate": f"{statistics.mean(means):.4f}",
        "standard_error": f"{statistics.stdev(means) / audits**0.5:.4f}",
        "covered_percent": f"{100 * covered / audits:.1f}",
    }


@torch.inference_mode()
def cost(length: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = SSAConfig.preset("balanced", d_model=512, num_heads=8, causal=True, dense_below=0)
    model, x = SparseTransformer(config, 1).eval(), torch.randn(1, length, 512)
    layer = model.layers[0].attn
    q, k, _ = layer.project(x)
    graph = layer.build_graph(q, k)
    times: dict[str, list[float]] = {"forward": [], "audit": []}
    for turn in range(rounds + 1):
        for name in times:
            started = time.process_time()
            if name == "forward":
                model(x)
            else:
                audit_graph(q, k, graph)
            if turn:  # the first one compiles
                times[name].append(time.process_time() - started)
    forward, audit = (statistics.median(times[name]) for name in ("forward", "audit"))
    options = AuditOptions()
    return {
        "what": "cost",
        "graph": "balanced",
        "length": length,
        "queries": options.queries,
        "keys": options.keys,
        "forward_cpu_ms": f"{1e3 * forward:.1f}",
        "audit_cpu_ms": f"{1e3 * audit:.2f}",
        "cost_percent": f"{100 * audit / forward:.2f}",
    }


def main(
    audits: Annotated[int, typer.Option(help="per graph and number of keys")] = 300,
    length: Annotated[list[int] | None, typer.Option(help="of the cost; 2048 and 8192 if left out")] = None,
    rounds: Annotated[int, typer.Option(help="of the cost")] = 5,
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "audit.csv",
) -> None:
    """Measure audits."""
    torch.set_num_threads(1)
    common = {"version": ssa_framework.__version__, "commit": commit(), "torch": torch.__version__}
    rows = [coverage(name, keys, audits) for name in GRAPHS for keys in (16, 64, 256, None)]
    rows += [cost(tokens, rounds) for tokens in length or (2048, 8192)]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    typer.run(main)
