"""Does anything grow with the number of calls? Memory, Python objects, threads and open files of a long run.

Every kind of call takes turns, with lengths that come in no order: layers in inference and in training, functions with
configurations of their own, masks, four threads, decoding on caches that come and go, models that are made, copied and
thrown away, a compiled layer. Prints one row for each stretch of time, and ends with status 1 where something grew
after the first one. Linux.

    python benchmarks/soak.py --seconds 600 --out benchmarks/results/soak.csv
"""

from __future__ import annotations

import copy
import csv
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from recall import commit
from rich.console import Console
from rich.table import Table

import ssa_framework
from ssa_framework import SparseAttention, SparseTransformer, SSACache, SSAConfig, sparse_attention

LENGTHS = (33, 64, 150, 257, 400)
COLUMNS = ["seconds", "calls", "memory_mib", "objects", "threads", "open_files", "version", "commit", "torch"]
MIXES = {
    "default": None,
    "clusters": {"global": {}, "clusters": {"levels": [[32, 8], [128, 16]], "keys": 32}},
    "listed": {"window": {}, "random": {}, "strided": {}, "blocks": {"size": 8, "keys": 32}},
}
LEAST_CALLS = 20
"""In each stretch."""
GROWTH_MIB = 24
"""Memory that may come and go: what malloc keeps depends on the order of lengths."""


def config(mix: str, **changes: object) -> SSAConfig:
    return SSAConfig(d_model=64, num_heads=4, num_neighbors=32, causal=True, sources=MIXES[mix], **changes)


def workload() -> list[Callable[[int], object]]:
    layers = {mix: SparseAttention(config(mix)) for mix in MIXES}
    model = SparseTransformer(config("clusters"), num_layers=2).eval()
    program = torch.compile(SparseAttention(config("clusters")), backend="aot_eager", fullgraph=True, dynamic=True)
    pool = ThreadPoolExecutor(4)

    @torch.no_grad()
    def infer(n: int) -> None:
        for layer in layers.values():
            layer(torch.randn(2, n, 64))

    def train(n: int) -> None:
        for layer in layers.values():
            layer.zero_grad()
            layer(torch.randn(2, n, 64))[0].sum().backward()

    @torch.no_grad()
    def function(n: int) -> None:
        x = torch.randn(1, 4, n, 16)
        sparse_attention(x, x, x, config=config("clusters", seed=random.randrange(10**6)))

    @torch.no_grad()
    def masks(n: int) -> None:
        x, keep = torch.randn(2, n, 64), torch.rand(2, n) > 0.2
        layers["clusters"](x, key_padding_mask=keep, segment_ids=torch.arange(n)[None] // 50)
        layers["default"](x, attention_mask=torch.rand(1, 1, n, n) > 0.1)

    def in_threads(n: int) -> None:
        for done in [pool.submit(infer, n) for _ in range(4)]:
            done.result()

    @torch.no_grad()
    def decode(n: int) -> None:
        cache = SSACache()
        for piece in torch.randn(1, n, 64).split(100, dim=1):
            model(piece, cache=cache)

    @torch.no_grad()
    def make_and_copy(n: int) -> None:
        made = SparseAttention(config("default", seed=n))
        copy.deepcopy(made)(torch.randn(1, n, 64))
        made.load_state_dict(layers["default"].state_dict())

    def compiled(n: int) -> None:
        program(torch.randn(2, n, 64))[0].sum().backward()
        with torch.no_grad():
            program(torch.randn(2, n, 64))

    return [infer, train, function, masks, in_threads, decode, make_and_copy, compiled]


def state() -> dict[str, int | float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "memory_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "open_files": len(os.listdir("/proc/self/fd")),
    }


def main(
    seconds: Annotated[float, typer.Option(help="how long")] = 600.0,
    rows: Annotated[int, typer.Option(min=3, help="stretches of time")] = 12,
    out: Annotated[Path | None, typer.Option(help="CSV file")] = None,
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    calls = workload()
    # two rounds of everything before the clock runs: kernels are compiled, pools and small caches filled
    for _ in range(2):
        for call in calls:
            for length in LENGTHS:
                call(length)
    for seed in range(64):
        calls[2](33 + seed % 2)
    table = Table("seconds", "calls", "memory MiB", "objects", "threads", "open files")
    found, done, begin = [], 0, time.perf_counter()
    for row in range(rows):
        before = done
        while time.perf_counter() - begin < seconds * (row + 1) / rows or done < before + LEAST_CALLS:
            random.choice(calls)(random.choice(LENGTHS))
            done += 1
        now = {"seconds": round(time.perf_counter() - begin), "calls": done, **state()}
        found.append(now)
        table.add_row(*(str(x) for x in now.values()))
    Console(width=100).print(table)
    if out is not None:
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            stamp = {"version": ssa_framework.__version__, "commit": commit(), "torch": torch.__version__}
            writer.writerows(now | stamp for now in found)
    first, last = found[0], found[-1]
    allowed = {"memory_mib": GROWTH_MIB, "objects": 0.01 * first["objects"], "threads": 0, "open_files": 0}
    grown = [
        f"{what}: {first[what]} -> {last[what]}" for what, room in allowed.items() if last[what] > first[what] + room
    ]
    print("grows: " + "; ".join(grown) if grown else f"nothing grows in {done} calls")
    sys.exit(bool(grown))


if __name__ == "__main__":
    typer.run(main)
