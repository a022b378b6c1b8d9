"""Quality of routing against keys looked at and time, on queries and keys of a model of yours.

Takes a folder of captured layers, as `ssa compare MODEL --save FOLDER` and `save_layer` write them, or files `*.pt`,
one per layer, each `{"q": [H, N, D], "k": [Hkv, N, D], "v": [Hkv, N, D], "scale": float}` after the rotary embedding.
The first 4 tokens are always attended, and a window of 16 by all but the presets, which have none. Quality is that of a
sample of queries; those before position 2,048 are left out, they have little to choose from. Time is that of all
queries of the middle layer, routing and attention together, as a ratio to torch's dense attention, measured in turns
(above 1 = faster than dense). Writes one CSV row per setting, means over layers, and a picture of error against keys
and against time.

    python benchmarks/routing_quality.py TENSORS --out benchmarks/results/routing_quality.csv
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from recall import commit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import ssa_framework
from ssa_framework import SSAConfig
from ssa_framework.laboratory.capture import load_layers
from ssa_framework.laboratory.compare import Comparison, MixResult, compare, stages
from ssa_framework.presets import PRESETS

FIRST_QUERY, WINDOW, TOKENS = 2048, 16, 4
COLUMNS = [
    "source", "options", "neighbors", "keys_scored", "keys_attended", "summaries", "recall_at_32",
    "recall_beyond_window", "attention_mass", "output_error", "output_error_p95", "times_dense", "sparse_ms",
    "dense_ms", "threads", "layers", "length", "queries", "version", "commit", "torch",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A source with its options beside the fixed pattern, or a preset. ``neighbors``: chosen by content."""

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    neighbors: int = 128

    @property
    def config(self) -> SSAConfig:
        if self.source == "preset":
            return SSAConfig.preset(self.options["name"], dense_below=0)
        mix: dict[str, Any] = {"self": {}, "window": {"size": WINDOW}, "global": {"tokens": TOKENS}}
        mix[self.source] = self.options
        window = max(WINDOW, self.options.get("size", 0)) if self.source == "window" else WINDOW
        return SSAConfig(sources=mix, num_neighbors=self.neighbors + window + 1 + TOKENS)


CROSS: dict[str, Any] = {"hash": "cross_polytope"}
LSH: list[dict[str, Any]] = [
    *({"candidates": c} for c in (32, 64, 128, 256)),
    *({"rounds": r, "candidates": 64} for r in (2, 4)),  # what `gpu.py` calls few and lean
    *({"candidates": c, "center": False} for c in (64, 256)),
    *({"candidates": 128, "probes": p} for p in (2, 4, 8, 16)),
    *({"candidates": 128, "probes": 4, "rounds": r} for r in (4, 12, 16)),
    *({**CROSS, "candidates": c} for c in (32, 64, 128, 256)),
    *({**CROSS, "candidates": c, "center": False} for c in (64, 256)),
    *({**CROSS, "candidates": 128, "probes": p} for p in (1, 3, 8, 16)),
    *({**CROSS, "candidates": 160, "rounds": r, "probes": 3, "max_planes": 7, "limit": 38} for r in (4, 8, 12, 16)),
    *({**CROSS, "candidates": 160, "rounds": 16, "probes": 2, "max_planes": 7, "limit": n} for n in (16, 24, 36, 72)),
]
ONE_LEVEL: list[tuple[int, int, int]] = [(256, 8, 192), (512, 16, 192), (512, 16, 384), (1024, 32, 256)]
SETTINGS: list[Setting] = [
    *(Setting("lsh", options) for options in LSH),
    *(Setting("preset", {"name": name}) for name in PRESETS),
    *(Setting("clusters", {"keys": keys}) for keys in (96, 192, 512)),
    *(Setting("clusters", {"levels": [[s, c]], "keys": keys}) for s, c, keys in ONE_LEVEL),
    Setting("clusters", {"summaries": False}),
    Setting("clusters", {"attend": "topk"}),
    Setting("clusters", {"attend": "topk", "summaries": False}),
    *(Setting("blocks", {"attend": "all", "summaries": True, "keys": keys}) for keys in (128, 256, 512)),
    Setting("blocks", {"attend": "all"}),
    Setting("blocks", {"attend": "all", "rank": "mean", "size": 64}),
    Setting("blocks", {}),
    Setting("blocks", {"rank": "mean"}),
    *(Setting("faiss", {"index": "IVF128,Flat", "nprobe": n}) for n in (4, 16)),
    *(Setting("window", {"size": size}) for size in (128, 512, 1024)),
    *(Setting("topk", {}, neighbors) for neighbors in (32, 128, 512)),
]


def row(setting: Setting, result: MixResult, comparison: Comparison) -> dict[str, Any]:
    quality, times = result.quality, result.times
    if times is None:
        raise SystemExit(f"{setting.source} {setting.options}: {result.message}")
    return {
        "source": setting.source,
        "options": json.dumps(setting.options),
        "neighbors": setting.neighbors,
        "keys_scored": f"{quality.keys_scored:.0f}",
        "keys_attended": f"{quality.keys_attended:.0f}",
        "summaries": f"{quality.summaries:.0f}",
        "recall_at_32": f"{quality.recall:.4f}",
        "recall_beyond_window": f"{quality.recall_beyond or 0.0:.4f}",
        "attention_mass": f"{quality.attention_mass:.4f}",
        "output_error": f"{quality.output_error_total:.4f}",
        "output_error_p95": f"{quality.output_error_p95:.4f}",
        "times_dense": f"{times.times_dense:.2f}",
        "sparse_ms": f"{1e3 * times.total:.0f}",
        "dense_ms": f"{1e3 * times.dense.median:.0f}",
        "threads": comparison.threads,
        "layers": len(comparison.layers),
        "length": comparison.length,
        "queries": comparison.queries,
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


GROUPS = {
    "preset": ("presets", "#D55E00", "*"),
    "clusters": ("clusters", "#CC79A7", "o"),
    "blocks": ("blocks", "#56B4E9", "s"),
    "lsh": ("lsh", "#009E73", "^"),
    "faiss": ("faiss", "#0072B2", "v"),
    "window": ("window", "#777777", "x"),
    "topk": ("topk, exact", "#000000", "D"),
}
"""Label, colour of the palette of Okabe and Ito, marker."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Output error against what a query looks at, and against time; lower and further left is better."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for source, (label, color, marker) in GROUPS.items():
        mine = [r for r in rows if r["source"] == source]
        errors = [float(r["output_error"]) for r in mine]
        looked = [max(int(r["keys_scored"]), int(r["keys_attended"])) + int(r["summaries"]) for r in mine]
        times = [1.0 / float(r["times_dense"]) for r in mine]
        size = 130 if source == "preset" else 32
        for ax, x in zip(axes, (looked, times), strict=True):
            ax.scatter(x, errors, s=size, c=color, marker=marker, label=label, zorder=3 if source == "preset" else 2)
    for r in rows:
        if r["source"] == "preset":
            at = 1.0 / float(r["times_dense"]), float(r["output_error"])
            axes[1].annotate(json.loads(r["options"])["name"], at, xytext=(8, 4), textcoords="offset points")
    axes[0].set_xlabel("keys scored or attended, and summaries, per query")
    axes[1].set_xlabel("time / time of dense attention")
    axes[1].axvline(1.0, color="0.6", linewidth=1)
    axes[0].set_ylabel("output error")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.grid(which="both", alpha=0.25)
    axes[0].legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=120)


def main(
    tensors: Annotated[Path, typer.Argument(help="folder of *.pt files, one per layer")],
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "routing_quality.csv",
    picture: Annotated[Path | None, typer.Option(help="file of the picture; beside the CSV file if left out")] = None,
    sample: Annotated[int, typer.Option(help="queries per head")] = 128,
    threads: Annotated[int, typer.Option(help="threads")] = 1,
) -> None:
    """Measure settings of all sources on captured queries and keys."""
    torch.set_num_threads(threads)
    layers = list(load_layers(tensors))
    mixes = {str(i): setting.config for i, setting in enumerate(SETTINGS)}
    with Progress() as progress:
        task = progress.add_task("measuring", total=stages(len(layers), len(mixes), timed=True))
        comparison = compare(
            layers,
            mixes,
            queries=sample,
            first_query=FIRST_QUERY,
            exact_at=(),
            seconds=0.0,
            on_stage=lambda _: progress.advance(task),
        )
    if not comparison.complete:
        raise typer.Exit(130)
    rows = [row(setting, result, comparison) for setting, result in zip(SETTINGS, comparison.mixes, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, picture or out.with_suffix(".png"))
    table = Table(*COLUMNS[:12])
    for r in rows:
        options = ", ".join(f"{name}={value}" for name, value in json.loads(r["options"]).items())
        table.add_row(r["source"], options, *(str(r[name]) for name in COLUMNS[2:12]))
    Console(width=190).print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
