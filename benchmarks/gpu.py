"""Sparse against dense attention on a CUDA GPU, routing included: checked first, then timed.

bfloat16, causal, K = 128, batch 1, one graph per KV head. Mixes: ``seed``, the default sources; ``lean`` and ``few``,
which hash fewer times and score fewer keys; ``wide``, as ``lean`` with a window of 64; and presets of clusters. Dense
attention is the fastest of torch's fused kernels (cuDNN, flash) in the same process. Both are timed as they are called,
and as replays of CUDA graphs, where the host's time does not count. Then one forward call at 1,048,576 tokens. Writes
one CSV row per case, as `ssa bench` does.

    python benchmarks/gpu.py --out benchmarks/results/gpu.csv
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from ssa_framework import SSAConfig, build_graph, sparse_attention
from ssa_framework.quality.bench import BenchCase, BenchRow, run_case, write_csv

SHARED = SSAConfig(graph_heads="kv")
FIXED = {"self": {}, "window": {"size": 8}, "global": {"tokens": 2}}
LEAN = SHARED.replace(sources={**FIXED, "lsh": {"rounds": 4, "candidates": 64}})
WIDE_WINDOW = SHARED.replace(sources={**FIXED, "window": {"size": 64}, "lsh": {"rounds": 4, "candidates": 64}})
FEW = SHARED.replace(sources={**FIXED, "lsh": {"rounds": 2, "candidates": 64}})
PRESETS = {f"preset {name}": SSAConfig.preset(name, graph_heads="kv") for name in ("fast", "balanced", "quality")}
MIXES = {"seed": SHARED, "lean": LEAN, "few": FEW, "wide": WIDE_WINDOW, **PRESETS}
MILLION = 2**20
WIDE = {"heads": 32, "kv_heads": 8, "head_dim": 128}
NARROW = {"heads": 8, "head_dim": 64}


def cases(lengths: list[int]) -> Iterator[BenchCase]:
    """What is most worth knowing comes first."""

    def of(mix: str, mode: str, shape: dict[str, int], captured: bool, least: int = 0) -> Iterator[BenchCase]:
        common = {"dtype": "bfloat16", "causal": True, "device": "cuda", "dense_below": 0, "captured": captured}
        return (BenchCase(mix, MIXES[mix], length=n, mode=mode, **shape, **common) for n in lengths if n >= least)

    yield from of("lean", "forward", WIDE, True)
    yield from of("wide", "forward+backward", WIDE, True)
    yield from of("few", "forward", NARROW, True, 32768)
    for preset in PRESETS:
        yield from (case for case in of(preset, "forward", WIDE, True) if case.length in (32768, 131072))
    yield from of("wide", "forward", WIDE, True)
    yield from of("lean", "forward", WIDE, False)
    yield from of("wide", "forward+backward", WIDE, False)
    yield from of("seed", "forward", WIDE, True)
    yield from of("lean", "forward+backward", WIDE, True)
    yield from (case for case in of("preset fast", "forward+backward", WIDE, True) if case.length in (32768, 131072))


def attend(q: Tensor, k: Tensor, v: Tensor, config: SSAConfig) -> Tensor:
    return sparse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)


def tensors(length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn((1, h, length, dim), **options) for h in (heads, kv_heads, kv_heads)]


def events(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds between two events around one call."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def captured(length: int, config: SSAConfig) -> str:
    """Capture routing and attention in a CUDA graph, replay it on new inputs, compare with a plain call."""
    q, k, v = tensors(length)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            attend(q, k, v, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = attend(q, k, v, config)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    same = torch.equal(out, attend(q, k, v, config))
    if not same:
        raise SystemExit(f"the captured call at {length} tokens does not give what a plain call gives")
    plain = events(lambda: attend(q, k, v, config), 20)
    return f"captured at {length}: replay {events(graph.replay, 20):.2f} ms, plain call {plain:.2f} ms, bit-equal"


def million(config: SSAConfig) -> str:
    q, k, v = tensors(MILLION)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        taken = events(lambda: attend(q, k, v, config), 3)
        routing = events(lambda: build_graph(q, k, config=config, is_causal=True), 3)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return (
        f"{MILLION} tokens, 32/8 heads × 128, forward: {taken:.0f} ms, of which routing {routing:.0f} ms; "
        f"{peak:.1f} GiB beyond the inputs"
    )


def describe(row: BenchRow) -> str:
    case = row.case
    how = "replay" if case.captured else "call"
    shape = f"{case.heads}/{case.kv_heads or case.heads} × {case.head_dim}"
    if row.status != "ok" or row.dense is None or row.sparse is None or row.graph is None:
        return f"{case.mix:8} {case.length:7} {shape:10} {case.mode:17} {how:6} {row.status}: {row.message}"
    return (
        f"{case.mix:8} {case.length:7} {shape:10} {case.mode:17} {how:6} {row.ratio:6.2f} × dense   dense "
        f"{1e3 * row.dense.median:8.2f} ms ({row.dense_kernel})  sparse {1e3 * row.sparse.median:7.2f}  routing "
        f"{1e3 * row.graph.median:7.2f}  keys {row.keys_scored:.0f}  peak {(row.sparse_bytes or 0) / 2**20:.0f} MiB"
    )


def main(
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "gpu.csv",
    lengths: Annotated[list[int] | None, typer.Option(help="tokens")] = None,
    min_time: Annotated[float, typer.Option(help="seconds of readings per case")] = 1.0,
    mixes: Annotated[list[str] | None, typer.Option("--mix", help="these only, and nothing but their cases")] = None,
    stop_after: Annotated[float, typer.Option(help="begin no case after so many seconds")] = 3600.0,
) -> None:
    """Check and time mixes on the GPU."""
    start = time.perf_counter()
    rows: list[BenchRow] = []
    for case in cases(lengths or [16384, 32768, 65536, 131072]):
        if mixes and case.mix not in mixes:
            continue
        torch.cuda.empty_cache()
        if time.perf_counter() - start > stop_after:
            print(
                f"stopped after {stop_after:.0f} s; {case.mix} at {case.length}, {case.mode}, and what follows not run"
            )
            break
        row = run_case(case, min_seconds=min_time, sample=32)
        if row.status == "error" and case.captured:  # what cannot be captured is timed as it is called
            print(describe(row), flush=True)
            row = run_case(replace(case, captured=False), min_seconds=min_time, sample=32)
        rows.append(row)
        print(describe(rows[-1]), f" [{time.perf_counter() - start:.0f} s]", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(rows, out)
    if not mixes:
        print(captured(16384, SHARED), flush=True)
        print(million(LEAN), flush=True)
    if any(row.status != "ok" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
