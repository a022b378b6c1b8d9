"""The Triton implementation of `lsh_slices` on a CUDA device: checked against torch first, then timed.

    python benchmarks/gpu_hashing.py [--lengths 16384 32768] [--out times.csv]

Times are CUDA events around one call (median and 90th percentile), the host's time to issue a call, and the median of
replays of a CUDA graph of the op.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.lsh_slices import HashLevels, lsh_slices
from ssa_framework.source import LayerSpec, RoutingContext
from ssa_plugins.lsh import LSH

Made = tuple[Tensor, Tensor, Tensor]
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"probes": 3},
    {"hash": "cross_polytope"},
    {"hash": "cross_polytope", "probes": 3},
)


def source_and_levels(
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int = 8,
    dim: int = 128,
    causal: bool = True,
    neighbors: int = 128,
    padding: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[LSH, HashLevels]:
    """An ``lsh`` source on the device, and the levels that it asks for."""
    layer = LayerSpec(head_dim=dim, num_heads=heads, num_kv_heads=kv_heads, graph_heads=heads, num_neighbors=neighbors)
    source = LSH(layer, **options).cuda()
    q, k = (torch.empty((batch, h, n, dim), device="cuda") for h, n in ((heads, queries), (kv_heads, keys)))
    mask = make_edge_mask(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        device=q.device,
        causal=causal,
        query_positions=torch.arange(queries, device="cuda") + (keys - queries if causal else 0),
        key_padding_mask=padding,
        segment_ids=ids,
    )
    return source, source._levels(RoutingContext(q=q, shared_k=k, mask=mask, budget=64))


def same_share(got: Made, want: Made) -> float:
    """Share of the slices that hold the same keys in the same order, by weighted sums of the keys."""

    def digest(made: Made) -> list[Tensor]:
        order, start, end = made
        group = start.shape[1] // order.shape[1]
        order = order.repeat_interleave(group, 1).long()
        place = torch.arange(order.shape[-1], device=order.device)
        bounds = [x.permute(0, 1, 3, 2, 4).flatten(3).long() for x in (start, end)]  # [B, G, S, N·P]
        parts = [bounds[1] - bounds[0]]
        for values in (order, order * order % 65521, order * place):
            sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
            parts.append(sums.gather(-1, bounds[1]) - sums.gather(-1, bounds[0]))
        parts[3] -= bounds[0] * parts[1]  # places counted from the start of the slice
        return parts

    same = torch.stack([a == b for a, b in zip(digest(got), digest(want), strict=True)]).all(0)
    return float(same.double().mean())


def cases() -> list[dict[str, Any]]:
    """Kinds of calls; ``shape``: batch, queries, keys, head dim."""
    both = ("hyperplane", "cross_polytope")
    sizes = (
        {"shape": (2, 1000, 1000, 64), "dtype": torch.bfloat16},
        {"shape": (1, 77, 4097, 128), "dtype": torch.float16},
        {"shape": (1, 300, 9000, 40), "dtype": torch.float32},
    )
    # every kernel is compiled anew for most of these, which is what takes the time
    found = [
        {"hash": family, "probes": probes, "causal": (number + probes) % 2 == 0, **size}
        for family, probes, (number, size) in itertools.product(both, (0, 3), enumerate(sizes))
    ]
    some = {"causal": True, "shape": (2, 3000, 3000, 64), "dtype": torch.bfloat16}
    kinds = ({"documents": 7, "probes": 2}, {"padding": True, "probes": 0}, {"rounds": 20, "probes": 0})
    found += [{"hash": family, **some, **extra} for family, extra in itertools.product(both, kinds)]
    wide = {"probes": 1, "causal": True, "shape": (1, 4000, 4000, 256)}
    return [
        *found,
        {**some, "hash": "hyperplane", "probes": 0, "shape": (1, 65536, 65536, 128)},
        {**some, "hash": "cross_polytope", "probes": 7, "shape": (1, 20000, 20000, 64)},
        {**wide, "hash": "hyperplane", "dtype": torch.bfloat16},
        {**wide, "hash": "hyperplane", "dtype": torch.float32},
        {**wide, "hash": "cross_polytope", "dtype": torch.bfloat16},
        {**some, "hash": "hyperplane", "probes": 0, "causal": False, "shape": (1, 4000, 40000, 64), "candidates": 1,
         "max_planes": 16},
    ]  # fmt: skip


def agrees(case: dict[str, Any]) -> bool:
    """One kind of call against torch: the same slices where projections are exact, nearly all where keys are centred,
    and equal bits from run to run. Prints what was found."""
    generator = torch.Generator("cuda").manual_seed(0)
    batch, queries, keys, dim = case["shape"]
    options = {"generator": generator, "device": "cuda"}
    extra: dict[str, Any] = {key: case[key] for key in ("rounds", "candidates", "max_planes") if key in case}
    if "documents" in case:
        ids = torch.randint(0, case["documents"], (batch, keys), **options).sort(1).values
        extra["ids"] = (ids, ids)
    if "padding" in case:
        extra["padding"] = torch.rand((batch, keys), **options) > 0.05
    source, levels = source_and_levels(
        queries, keys, batch=batch, heads=4, kv_heads=2, dim=dim, causal=case["causal"], neighbors=64,
        hash=case["hash"], probes=case["probes"], **{"candidates": 24, **extra},
    )  # fmt: skip

    shapes = ((batch, 4, queries, dim), (batch, 2, keys, dim))
    exact = [torch.randint(-40, 41, shape, **options).float() for shape in shapes]
    planes = torch.randint(-9, 10, source.planes.shape, **options).float()
    drawn = [torch.randn(shape, **options) for shape in shapes]
    drawn[1] += 5 * torch.randn((2, 1, dim), **options)
    shares, repeated = [], True
    for (q, k), directions, center in ((exact, planes, False), (drawn, source.planes, True)):
        made = [
            lsh_slices(
                q.to(case["dtype"]), k.to(case["dtype"]), directions, levels, family=case["hash"],
                probes=case["probes"], center=center, backend=backend,
            )
            for backend in ("triton", "triton", "torch")
        ]  # fmt: skip
        shares.append(same_share(made[0], made[2]))
        repeated &= all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    well = shares[0] == 1.0 and shares[1] > 0.99 and repeated
    verdict = "ok " if well else "BAD"
    print(
        f"{verdict} {case}: same slices {shares[0]:.6f} exact, {shares[1]:.6f} centred; repeated {repeated}", flush=True
    )
    return well


def times(call: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
    """Milliseconds."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    host = []
    for start, end in events:
        start.record()
        before = time.perf_counter()
        call()
        host.append((time.perf_counter() - before) * 1e3)
        end.record()
        torch.cuda.synchronize()
    device = sorted(start.elapsed_time(end) for start, end in events)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replays = []
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        replays.append(start.elapsed_time(end))
    return {
        "call_ms": statistics.median(device),
        "call_p90_ms": device[int(0.9 * len(device))],
        "host_ms": statistics.median(host),
        "graph_ms": statistics.median(replays),
    }


def timed_call(length: int, *, backend: str = "triton", **options: Any) -> Callable[[], Made]:
    """The op at one setting, on keys with a mean of their own."""
    source, levels = source_and_levels(length, length, **options)
    q, k = (torch.randn((1, 8, length, 128), device="cuda").bfloat16() for _ in range(2))
    k += (4 * torch.randn((8, 1, 128), device="cuda")).bfloat16()
    return lambda: lsh_slices(q, k, source.planes, levels, family=source.hash, probes=source.probes, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--out", help="CSV to write")
    options = parser.parse_args()
    if not all(agrees(case) for case in cases()):
        sys.exit("wrong results; nothing timed")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows = []
    for length in options.lengths:
        for setting in SETTINGS:
            row = {"length": length, "setting": str(setting), **times(timed_call(length, **setting))}
            rows.append(row)
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
