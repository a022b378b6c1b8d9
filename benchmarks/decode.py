"""One decode step on a cache (append, route, attend) beside one dense step over keys and values of the same length.

Batch 1, 8 heads over 8 KV heads × 64, one query, float32, Gaussian data, on a CPU. The dense step is torch's
`scaled_dot_product_attention` on contiguous keys and values that are there already. Each configuration first decodes a
sample token by token and in one call: neighbors must be equal, outputs close. Writes one CSV row per configuration and
length: medians, 10th and 90th percentiles of single steps, in milliseconds.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --out benchmarks/results/decode.csv

With ``--device cuda`` it measures what `gpu_decode` describes:

    python benchmarks/decode.py --device cuda --mix "preset fast" --out decode_cuda.csv    # the longest first
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import gpu_decode
import torch
import typer
from recall import commit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ssa_framework
from ssa_framework import LayerCache, SSAConfig, sparse_attention
from ssa_framework.decoding import attend_cached
from ssa_framework.router import Router

LENGTHS = (8192, 32768, 131072)
HEADS, DIM = 8, 64
SAMPLE = 3000
"""Tokens of the check; enough for clusters of two levels."""
MIXES = {
    **{f"preset {name}": SSAConfig.preset(name, causal=True).sources for name in ("fast", "balanced", "quality")},
    "lsh": SSAConfig().source_mix,  # the default sources
    "lean": {"self": {}, "window": {"size": 8}, "global": {"tokens": 2}, "lsh": {"rounds": 4, "candidates": 64}},
    "window": {"window": {"size": 128}},
}
COLUMNS = [
    "length", "mix", "step_ms", "step_p10_ms", "step_p90_ms", "dense_ms", "dense_p10_ms", "dense_p90_ms", "speedup",
    "keys_attended", "threads", "version", "commit", "torch",
]  # fmt: skip


def config(mix: str) -> SSAConfig:
    return SSAConfig(
        d_model=HEADS * DIM, num_heads=HEADS, num_neighbors=128, causal=True, sources=MIXES[mix], dense_below=0
    )


def random_tokens(length: int, seed: int) -> list[Tensor]:
    """Queries, keys and values ``[1, HEADS, length, DIM]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, HEADS, length, DIM), generator=generator) for _ in range(3)]


def check(mix: str) -> None:
    """Raise where decoding a sample in pieces gives anything else than decoding it at once."""
    tokens, router = random_tokens(SAMPLE, 0), Router(config(mix))
    whole, _ = attend_cached(router, LayerCache(), *tokens)
    cache, start = LayerCache(), 0
    for length in (SAMPLE - 500, *[1] * 100, 300, *[1] * 100):
        rows = slice(start, start + length)
        out, _ = attend_cached(router, cache, *(x[:, :, rows] for x in tokens))
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-4, atol=1e-5)
        start += length
    torch.testing.assert_close(
        sparse_attention(*tokens, config=config(mix))[:, :, -1:], out[:, :, -1:], rtol=1e-4, atol=1e-5
    )


def milliseconds(step: Callable[[], object], seconds: float) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of single calls, after a few for warmth."""
    for _ in range(3):
        step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 11:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times) * 1e3, tenths[0] * 1e3, tenths[-1] * 1e3


def measure(mix: str, length: int, seconds: float) -> dict[str, object]:
    router, cache = Router(config(mix)), LayerCache()
    _, k, v = random_tokens(length, 1)
    cache.append(k, v)
    tokens = iter(zip(*(x.split(1, dim=2) for x in random_tokens(100_000, 2)), strict=True))
    graph = attend_cached(router, cache, *next(tokens))[1]
    assert graph is not None
    step = milliseconds(lambda: attend_cached(router, cache, *next(tokens)), seconds)
    q = random_tokens(1, 3)[0]
    dense = milliseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), seconds)
    return {
        "length": length,
        "mix": mix,
        **dict(zip(COLUMNS[2:8], (f"{x:.3f}" for x in (*step, *dense)), strict=True)),
        "speedup": f"{dense[0] / step[0]:.1f}",
        "keys_attended": f"{float((graph.degree() + graph.summaries_per_query()).float().mean()):.0f}",
        "threads": torch.get_num_threads(),
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


def main(
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "decode.csv",
    longest: Annotated[int, typer.Option(help="leave out longer caches")] = LENGTHS[-1],
    mixes: Annotated[list[str] | None, typer.Option("--mix", help=f"of {', '.join(MIXES)}")] = None,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 2.0,
    threads: Annotated[int, typer.Option(help="threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    check_only: Annotated[bool, typer.Option(help="with --device cuda: measure nothing")] = False,
) -> None:
    """Measure single steps of decoding."""
    chosen = mixes or list(MIXES)
    if device == "cuda":
        named = {name: MIXES[name] for name in chosen}
        if not check_only:
            gpu_decode.run(out, named, [n for n in LENGTHS if n <= longest])
        elif gpu_decode.failures(named):
            raise typer.Exit(1)
        return
    torch.set_num_threads(threads)
    for mix in track(chosen, "checking"):
        check(mix)
    cases = [(mix, length) for length in LENGTHS if length <= longest for mix in chosen]
    rows = [measure(*case, seconds) for case in track(cases, "measuring")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS[:10])
    for row in rows:
        table.add_row(*(str(row[name]) for name in COLUMNS[:10]))
    Console().print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
