"""Recall of content routing, always next to the number of keys scored for it.

Two kinds of data: random Gaussian queries and keys, where no index can help much, and queries and keys of the small
language model that `ssa demo` trains, on real text. Writes one CSV row per case.

    python benchmarks/recall.py                       # benchmarks/results/recall.csv, some minutes on one core
    python benchmarks/recall.py --lengths 1024 --steps 50 --out recall.csv
"""

from __future__ import annotations

import csv
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ssa_framework
from ssa_framework import SSAConfig, build_graph
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.text import load_text
from ssa_framework.cli.demo.train import make_twins, train
from ssa_framework.quality import measure

FIXED: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 8}, "global": {"tokens": 2}}
ROUTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "fixed pattern only": {},
    "lsh (defaults)": {"lsh": {}},
    "lsh, not centred": {"lsh": {"center": False}},
    "lsh, 8 probes": {"lsh": {"probes": 8}},
    "lsh, cross-polytope": {"lsh": {"hash": "cross_polytope"}},
    "lsh, cross-polytope, 8 probes": {"lsh": {"hash": "cross_polytope", "probes": 8}},
    "lsh, 6 rounds of 512 (98% of 1,024 keys)": {"lsh": {"rounds": 6, "candidates": 512}},
    "topk (exact)": {"topk": {}},
}
ORIGINAL_LIFT = {1024: 1.01, 2048: 1.12, 4096: 1.39, 8192: 1.82}
COLUMNS = [
    "data", "causal", "length", "layer", "routing", "recall_at_32", "recall_beyond_window", "attention_mass",
    "output_error", "output_error_p95", "keys_scored", "candidates", "share", "lift", "lift_of_the_original",
    "neighbors", "head_dim", "heads", "queries_measured", "version", "commit", "torch", "processor",
]  # fmt: skip


def gaussian(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn((3, 1, 4, length, 64), generator=generator)
    return q, k, v


def trained(steps: int, lengths: list[int]) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every layer of the demo's sparse model, on text that it was not trained on."""
    settings = replace(Settings(), steps=steps)
    text = load_text()
    runs = make_twins(settings)
    for _ in track(range(1), "training the demo's model"):
        train(runs[:1], text.train, text.validation, settings)
    body = runs[0].model.body
    captured = {}
    with torch.inference_mode():
        for length in lengths:
            if length > len(text.validation):
                continue
            hidden = body.embed(text.validation[:length][None])
            for number, layer in enumerate(body.layers):
                captured[length, number] = layer.attn.project(layer.norm1(hidden))
                hidden, _ = layer(hidden)
    return captured


def row(data: str, causal: bool, layer: int | None, routing: str, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    q, k, v = tensors
    config = SSAConfig(sources={**FIXED, **ROUTINGS[routing]}, num_neighbors=128)
    graph = build_graph(q, k, config=config, is_causal=causal)
    report = measure(q, k, v, graph, recall_at=32, sample=512)
    length = q.shape[2]
    return {
        "data": data,
        "causal": causal,
        "length": length,
        "layer": "" if layer is None else layer,
        "routing": routing,
        "recall_at_32": f"{report.recall:.4f}",
        "recall_beyond_window": "" if report.recall_beyond is None else f"{report.recall_beyond:.4f}",
        "attention_mass": f"{report.attention_mass:.4f}",
        "output_error": f"{report.output_error_total:.4f}",
        "output_error_p95": f"{report.output_error_p95:.4f}",
        "keys_scored": f"{sum(report.keys_scored.values()):.1f}",
        "candidates": f"{report.candidates:.1f}",
        "share": f"{min(1.0, report.candidates / report.allowed):.4f}",
        "lift": f"{report.lift:.3f}",
        "lift_of_the_original": ORIGINAL_LIFT.get(length, "") if data == "gaussian" else "",
        "neighbors": 128,
        "head_dim": q.shape[-1],
        "heads": q.shape[1],
        "queries_measured": report.queries,
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def commit() -> str:
    """Short hash of the checkout, marked where it has uncommitted changes."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def main(
    lengths: Annotated[list[int], typer.Option(help="sequence lengths")] = [1024, 2048, 4096, 8192],  # noqa: B006
    steps: Annotated[int, typer.Option(help="training steps of the demo's model")] = 150,
    out: Annotated[Path, typer.Option(help="CSV file to write")] = Path(__file__).parent / "results" / "recall.csv",
    threads: Annotated[int, typer.Option(help="threads")] = 1,
) -> None:
    """Measure recall next to keys scored."""
    torch.set_num_threads(threads)
    cases: list[tuple[str, bool, int | None, tuple[Tensor, ...]]] = [
        ("gaussian", False, None, gaussian(length)) for length in lengths
    ]
    cases += [("demo model", True, layer, tensors) for (_, layer), tensors in trained(steps, lengths).items()]
    rows = []
    for data, causal, layer, tensors in track(cases, "measuring"):
        rows += [row(data, causal, layer, routing, tensors) for routing in ROUTINGS]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    shown = ("data", "length", "layer", "routing", "recall_at_32", "keys_scored", "share", "lift", "output_error")
    table = Table(*shown)
    for entry in rows:
        table.add_row(*(str(entry[name]) for name in shown))
    Console().print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
