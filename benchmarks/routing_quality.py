"""Quality of routing against keys scored and time, on queries and keys of a model of yours.

Takes a folder of files `*.pt`, one per layer, each `{"q": [H, N, D], "k": [Hkv, N, D], "v": [Hkv, N, D], "scale":
float}` after the rotary embedding. Causal; a window of 16 and the first 4 tokens are always attended; 128 more keys are
chosen. Quality is that of a sample of queries; those before position 2,048 are left out, they have little to choose
from. Time is that of all queries of the middle layer, routing and attention together, as a ratio to torch's dense
attention, measured in turns (above 1 = faster than dense). Writes one CSV row per setting, means over layers.

    python benchmarks/routing_quality.py TENSORS --out benchmarks/results/routing_quality.csv
"""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from recall import commit
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

import ssa_framework
from ssa_framework import SSAConfig, build_graph, sparse_attention
from ssa_framework.quality import measure
from ssa_framework.quality.timing import time_alternating

CROSS: dict[str, Any] = {"hash": "cross_polytope"}
LSH: list[dict[str, Any]] = [
    *({"candidates": c} for c in (32, 64, 128, 256)),
    *({"candidates": c, "center": False} for c in (64, 256)),
    *({"candidates": 128, "probes": p} for p in (2, 4, 8, 16)),
    *({"candidates": 128, "probes": 4, "rounds": r} for r in (4, 12, 16)),
    *({**CROSS, "candidates": c} for c in (32, 64, 128, 256)),
    *({**CROSS, "candidates": c, "center": False} for c in (64, 256)),
    *({**CROSS, "candidates": 128, "probes": p} for p in (1, 3, 8, 16)),
    *({**CROSS, "candidates": 160, "rounds": r, "probes": 3, "max_planes": 7, "limit": 38} for r in (4, 8, 12, 16)),
    *({**CROSS, "candidates": 160, "rounds": 16, "probes": 2, "max_planes": 7, "limit": n} for n in (16, 24, 36, 72)),
]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(("lsh", options) for options in LSH),
    ("clusters", {}),
    ("clusters", {"keys": 128}),
    ("clusters", {"keys": 512}),
    ("clusters", {"cluster": 16}),
    ("clusters", {"segment": 512}),
    ("clusters", {"segment": 512, "cluster": 16, "keys": 192}),
    ("clusters", {"segment": 2048}),
    ("blocks", {}),
    ("blocks", {"rank": "mean"}),
    ("blocks", {"size": 64}),
    ("topk", {}),
]
ROUNDS = 3
FIRST_QUERY, NEIGHBORS, WINDOW, TOKENS = 2048, 128, 16, 4
COLUMNS = [
    "source", "options", "keys_scored", "recall_at_32", "recall_beyond_window", "attention_mass", "output_error",
    "output_error_p95", "times_dense", "sparse_ms", "dense_ms", "threads", "layers", "length", "queries", "version",
    "commit", "torch",
]  # fmt: skip


def config_of(source: str, options: dict[str, Any]) -> SSAConfig:
    mix = {"self": {}, "window": {"size": WINDOW}, "global": {"tokens": TOKENS}, source: options}
    return SSAConfig(sources=mix, num_neighbors=NEIGHBORS + WINDOW + 1 + TOKENS)


def time_all(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of every setting against dense attention, all queries of one layer, all contestants in turns."""
    q, k, v = (layer[name][None].float() for name in "qkv")
    options = {"is_causal": True, "enable_gqa": True, "scale": layer["scale"]}
    contestants = {
        str(i): functools.partial(sparse_attention, q, k, v, config=config_of(*setting), **options)
        for i, setting in enumerate(SETTINGS)
    }
    contestants["dense"] = functools.partial(F.scaled_dot_product_attention, q, k, v, **options)
    total = len(contestants) * (1 + ROUNDS)
    with Progress() as progress:
        task = progress.add_task("timing", total=total)
        times = time_alternating(
            contestants, min_rounds=ROUNDS, max_rounds=ROUNDS, on_call=lambda _: progress.advance(task)
        )
        progress.update(task, completed=total)
    dense = times["dense"].median
    return [
        {
            "times_dense": f"{dense / times[str(i)].median:.2f}",
            "sparse_ms": f"{1e3 * times[str(i)].median:.0f}",
            "dense_ms": f"{1e3 * dense:.0f}",
            "threads": torch.get_num_threads(),
        }
        for i in range(len(SETTINGS))
    ]


def evaluate(source: str, options: dict[str, Any], layers: list[dict[str, Any]], sample: int) -> dict[str, Any]:
    """Means over layers; queries are a seeded sample, the same for every setting."""
    config = config_of(source, options)
    reports, scored = [], []
    for layer in layers:
        q, k, v = (layer[name][None].float() for name in "qkv")
        length = k.shape[2]
        generator = torch.Generator().manual_seed(0)
        rows = (torch.randperm(length - FIRST_QUERY, generator=generator)[:sample] + FIRST_QUERY).sort().values
        query = q[:, :, rows]
        graph = build_graph(query, k, config=config, is_causal=True, query_positions=rows)
        reports.append(measure(query, k, v, graph, sample=sample, scale=layer["scale"]))
        scored.append(graph.keys_scored()[source])

    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.4f}"

    return {
        "source": source,
        "options": json.dumps(options),
        "keys_scored": f"{sum(scored) / len(scored):.0f}",
        "recall_at_32": mean([r.recall for r in reports]),
        "recall_beyond_window": mean([r.recall_beyond or 0.0 for r in reports]),
        "attention_mass": mean([r.attention_mass for r in reports]),
        "output_error": mean([r.output_error_total for r in reports]),
        "output_error_p95": mean([r.output_error_p95 for r in reports]),
        "layers": len(layers),
        "length": length,
        "queries": len(rows),
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


def main(
    tensors: Annotated[Path, typer.Argument(help="folder of *.pt files, one per layer")],
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "routing_quality.csv",
    sample: Annotated[int, typer.Option(help="queries per head")] = 128,
    threads: Annotated[int, typer.Option(help="threads")] = 1,
) -> None:
    """Measure settings of `lsh`, `clusters` and `topk` on captured queries and keys."""
    torch.set_num_threads(threads)
    layers = [torch.load(path, weights_only=True) for path in sorted(tensors.glob("*.pt"))]
    if not layers:
        raise typer.BadParameter(f"no *.pt files in {tensors}")
    rows = [evaluate(*setting, layers, sample) for setting in track(SETTINGS, "measuring")]
    for row, times in zip(rows, time_all(layers[len(layers) // 2]), strict=True):
        row.update(times)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS[:9])
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in json.loads(row["options"]).items())
        table.add_row(row["source"], options, *(str(row[name]) for name in COLUMNS[2:9]))
    Console(width=180).print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
