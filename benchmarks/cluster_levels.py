"""What levels of clusters cost and save at growing length: time of routing and of attention, for one to three levels.

Causal, float32, 8 heads x 64, one thread, first 4 tokens and 192 keys of clusters (the preset `balanced`). Keys are
random with topics in runs, so that clusters differ in size as in text. Attention at the first length is checked
against the reference. Writes one CSV row per length and number of levels.

    python benchmarks/cluster_levels.py --length 8192 --length 32768
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recall import commit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ssa_framework
from ssa_framework import SSAConfig, build_graph, sparse_attention
from ssa_framework.quality.exactness import output_difference
from ssa_framework.quality.timing import time_alternating

LEVELS: list[tuple[int, int]] = [(256, 8), (2048, 32), (8192, 64)]
COLUMNS = [
    "length", "levels", "graph_ms", "attend_ms", "keys_attended", "summaries", "output_difference", "threads",
    "version", "commit", "torch",
]  # fmt: skip
_WORST = 1e-5


def tensors(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[1, 8, N, 64]`` each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64, generator=generator) for _ in range(3))
    topics = 2 * torch.randn(64, 64, generator=generator)
    topic = torch.randint(64, (length // 32 + 1,), generator=generator).repeat_interleave(32)[:length]
    return q + topics[topic], k + topics[topic], v


def measure(length: int, levels: list[tuple[int, int]], check: bool) -> dict[str, Any]:
    mix = {"global": {"tokens": 4}, "clusters": {"levels": levels, "keys": 192}}
    config = SSAConfig(sources=mix, dense_below=0)
    q, k, v = tensors(length)
    graph = build_graph(q, k, config=config, is_causal=True)
    difference = output_difference(q, k, v, graph, sparse_attention(q, k, v, graph=graph)) if check else None
    if difference is not None and not difference < _WORST:
        raise SystemExit(f"levels {levels} at {length}: the output differs from the reference by {difference:.1e}")
    calls = {
        "graph": partial(build_graph, q, k, config=config, is_causal=True),
        "attend": partial(sparse_attention, q, k, v, graph=graph),
    }
    times = time_alternating(calls, min_rounds=3, max_rounds=3)
    return {
        "length": length,
        "levels": json.dumps(levels),
        "graph_ms": f"{1e3 * times['graph'].median:.1f}",
        "attend_ms": f"{1e3 * times['attend'].median:.1f}",
        "keys_attended": f"{float(graph.degree().float().mean()):.0f}",
        "summaries": f"{float(graph.summaries_per_query().float().mean()):.0f}",
        "output_difference": "" if difference is None else f"{difference:.2e}",
        "threads": torch.get_num_threads(),
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


def main(
    length: Annotated[list[int] | None, typer.Option(help="lengths; 8192 to 131072 if left out")] = None,
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "cluster_levels.csv",
) -> None:
    """Time one to three levels of clusters."""
    torch.set_num_threads(1)
    lengths = length or [8192, 16384, 32768, 65536, 131072]
    cases = [(n, LEVELS[:count]) for n in lengths for count in range(1, len(LEVELS) + 1) if n > LEVELS[count - 1][0]]
    rows = [measure(n, levels, check=n == lengths[0]) for n, levels in track(cases, "measuring")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS[:7])
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS[:7]))
    Console(width=140).print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
