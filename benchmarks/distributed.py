"""Context parallelism over all processes of torchrun: checked against one process, then timed, its bytes counted.

    torchrun --nproc-per-node 2 benchmarks/distributed.py

NCCL where every process has a GPU (bfloat16, causal, 32 query heads over 8 KV heads × 128), else gloo on CPUs (float32,
8 over 2 × 64). Compared with one process, which has the whole sequence (every rank runs it for itself, nothing is
sent), and with all-gather: every rank gathers all keys and values, and routes and attends with its own queries; its
backward pass is a reduce-scatter. Bytes are those that a rank receives from others, the most of all ranks. Then DDP,
FSDP2, tensor parallelism and a checkpoint are tried on a small model. Writes one CSV row per check and case, each as
soon as it is known; the difference of a row is that to one process.

On a GPU the checks compile several hundred kernels, which takes minutes where Triton's cache does not have them yet.
Processes that compile at once fill it faster: start one for each ``--check`` and ``--mixes``, with ``--part``.

Without torchrun, ``--count`` counts bytes for any number of ranks, as threads of one process on a CPU, on vectors of a
real model (files with ``q``, ``k`` and ``v`` ``[heads, N, D]``, as `ssa capture` writes them) or on random ones.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from ssa_framework import SparseTransformer, SSAConfig, sparse_attention
from ssa_framework.distributed import (
    ContextParallel,
    check_agreement,
    context_parallel_attention,
    count_traffic,
    load_checkpoint,
    parallelize_context,
    run_ranks,
    save_checkpoint,
    tensor_parallel_plan,
)
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.router_cache import functional_router

FIXED: dict[str, Any] = {"self": {}, "window": {"size": 8}, "global": {"tokens": 2}}
PARTS = ("checks", "model", "times")
MODES = ("forward", "forward+backward")
MIXES = {
    "seed": SSAConfig(graph_heads="kv"),
    "lean": SSAConfig(graph_heads="kv", sources={**FIXED, "lsh": {"rounds": 4, "candidates": 64}}),
    "preset fast": SSAConfig.preset("fast", graph_heads="kv", dense_below=0),
    "preset balanced": SSAConfig.preset("balanced", graph_heads="kv", dense_below=0),
    "window 1024": SSAConfig(graph_heads="kv", sources={"window": {"size": 1024}, "global": {"tokens": 4}}),
}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "default sources": {**FIXED, "lsh": {"rounds": 3}},
    "window, strided, random": {"window": {"size": 3}, "strided": {"stride": 7, "count": 3}, "random": {"links": 3}},
    "topk": {"topk": {}},
    "blocks": {"self": {}, "blocks": {"size": 8}},
    "blocks, all, summaries": {"self": {}, "blocks": {"size": 8, "attend": "all", "keys": 16, "summaries": True}},
    "clusters": {**FIXED, "clusters": {"levels": [[16, 4], [32, 8]], "keys": 12}},
    "clusters, best": {"clusters": {"levels": [[32, 8]], "keys": 16, "attend": "topk", "summaries": False}},
}
FIELDS = (
    "mix", "data", "method", "mode", "length", "ranks", "heads", "kv_heads", "head_dim", "dtype", "milliseconds",
    "bytes_received", "bytes_of_all_gather", "share_of_all_gather", "bytes_by_purpose", "rows_changed", "difference",
    "device", "torch", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the tensors that are timed."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    lengths: tuple[int, ...]


WIDE = Shape(32, 8, 128, torch.bfloat16, (32768, 131072, 262144))
NARROW = Shape(8, 2, 64, torch.float32, (4096, 16384))


class AllGather(torch.autograd.Function):
    """``[B, Hkv, N / W, D]`` of every rank → ``[B, Hkv, N, D]`` by position; backwards, a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return context.unshard(x, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        context: ContextParallel = ctx.context
        layout = context.of_length(grads[0].shape[2])
        parts = torch.stack([layout.shard(grads[0], rank, 2) for rank in range(layout.ranks)])
        out = torch.empty_like(parts[0])
        if out.device.type == "cpu":  # gloo has no reduce-scatter in every version
            dist.all_reduce(parts)
            out = parts[context.ranks.rank]
        else:
            dist.reduce_scatter_tensor(out, parts.flatten(0, 1))
        return out, None


def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, context: ContextParallel, config: SSAConfig) -> Tensor:
    """What context parallelism is compared with."""
    k, v = AllGather.apply(k, context), AllGather.apply(v, context)
    layout = context.of_length(k.shape[2])
    rank = context.ranks.rank
    mask = make_edge_mask(
        batch=q.shape[0], heads=q.shape[1], queries=q.shape[2], keys=k.shape[2], device=q.device, causal=True,
        query_positions=layout.positions(rank, q.device),
    )  # fmt: skip
    router = functional_router(config, q, k, True, None)
    dense_below = None if router.dense_below == "auto" else router.dense_below
    graph = router.route(q, k, mask, cross=False, dense_below=dense_below, partial=True)
    outs, first = [], 0
    for start, stop in layout.chunks(rank):
        rows = slice(first, first + stop - start)
        first = rows.stop
        piece = graph.with_queries(replace(mask.rows(rows), offset=start), rows)
        outs.append(neighbor_attention(q[:, :, rows], k, v, piece)[0])
    return torch.cat(outs, dim=2)


# -- checks -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def largest(value: float, device: torch.device) -> float:
    """The largest of all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def check_attention(device: torch.device, names: list[str]) -> Iterator[dict[str, Any]]:
    """Context parallelism against one process: outputs and gradients of every source."""
    ranks = dist.get_world_size()
    length = 64 * ranks
    shape = Shape(4, 2, 32, torch.float32, (length,))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn((2, h, length, 32), generator=generator).to(device) for h in (4, 2, 2, 4)]
    documents = torch.arange(length, device=device).expand(2, -1) // (length // 3 + 1)
    keep = torch.ones((2, length), dtype=torch.bool, device=device)
    keep[:, -5:] = False
    for name in names:
        sources, worst = SMALL[name], 0.0
        for causal in (True, False):
            context = ContextParallel.over(None, layout="zigzag" if causal else "contiguous")
            for masks in ({}, {"segment_ids": documents, "key_padding_mask": keep}):
                for heads in ("query", "kv"):
                    config = SSAConfig(sources=sources, num_neighbors=24, causal=causal, graph_heads=heads)
                    q, k, v = (x.clone().requires_grad_() for x in whole[:3])
                    out = sparse_attention(q, k, v, config=config, enable_gqa=True, **masks)
                    out.backward(whole[3])
                    parts = [context.shard(x, 2).clone().requires_grad_() for x in whole[:3]]
                    local = {mask: context.shard(x, 1) for mask, x in masks.items()}
                    mine = context_parallel_attention(*parts, context, config=config, **local)
                    mine.backward(context.shard(whole[3], 2))
                    pairs = [
                        (out.detach(), mine.detach()),
                        *((a.grad, b.grad) for a, b in zip((q, k, v), parts, strict=True)),
                    ]
                    for one, many in pairs:
                        one = context.shard(one, 2)
                        worst = max(worst, float((one - many).norm() / one.norm().clamp(min=1e-9)))
                # on a GPU most of the time goes into compiling kernels, and nothing else would tell it from waiting
                say(f"    {name}: {'causal' if causal else 'not causal'}, {'masked' if masks else 'plain'}")
        # on a GPU another tiling may decide other ties
        yield checked(name, "context parallel", "forward+backward", shape, length, worst, 1e-5, 5e-3, device)


def checked(
    name: str, method: str, mode: str, shape: Shape, length: int, worst: float, on_cpu: float, on_gpu: float,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The row of a check whose largest relative difference must stay below ``on_cpu`` or ``on_gpu``."""
    worst = largest(worst, device)
    fine = worst <= (on_cpu if device.type == "cpu" else on_gpu)
    say(f"{'ok ' if fine else 'BAD'} {name}, {method}: largest relative difference {worst:.1e}")
    row = {"mix": name, "data": "random", "method": method, "mode": mode, "difference": f"{worst:.2e}", "fine": fine}
    return row | _facts(shape, length, dist.get_world_size(), device)


def check_model(device: torch.device) -> Iterator[dict[str, Any]]:
    """DDP, FSDP2, tensor and context parallelism of a small model against one process: losses of three steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))
    config = SSAConfig(
        d_model=32 * ranks, num_heads=2 * ranks, num_kv_heads=ranks, num_neighbors=16, causal=True, num_hash_rounds=2,
        window_size=4, rope_base=10000.0,
    )  # fmt: skip
    tokens = torch.randint(50, (2 * ranks, 32 * ranks), generator=torch.Generator().manual_seed(1)).to(device)
    batch, everything = tokens[2 * rank : 2 * rank + 2], tokens

    def model() -> SparseTransformer:
        torch.manual_seed(0)
        return SparseTransformer(config, num_layers=2, vocab_size=50).to(device)

    def steps(one: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, average: bool) -> list[float]:
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = one(x)[0].square().sin().mean()
            loss.backward()
            optimizer.step()
            loss = loss.detach().clone()
            if average:
                dist.all_reduce(loss)
                loss /= ranks
            losses.append(float(loss))
        return losses

    def adam(one: nn.Module) -> torch.optim.Optimizer:
        # updates of many tensors at once refuse a mixture of plain and sharded ones, as the tensor-parallel plan leaves
        return torch.optim.AdamW(one.parameters(), lr=1e-2, foreach=False)

    def sharded() -> nn.Module:
        one = model()
        for layer in one.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(one, mesh=mesh)

    def with_tensor_parallelism() -> nn.Module:
        one = model()
        check_agreement(one)
        return parallelize_module(one, mesh, tensor_parallel_plan(one))

    found: dict[str, list[float]] = {}
    one = model()
    found["one process"] = steps(one, everything, adam(one), average=False)
    ddp = DistributedDataParallel(model())
    found["DDP"] = steps(ddp, batch, adam(ddp), average=True)
    fsdp = sharded()
    optimizer = adam(fsdp)
    found["FSDP2"] = steps(fsdp, batch, optimizer, average=True)
    tensor = with_tensor_parallelism()
    found["tensor parallel"] = steps(tensor, everything, adam(tensor), average=False)
    context_model = model()
    context = parallelize_context(context_model, mesh)
    spread = DistributedDataParallel(context_model)
    found["context parallel"] = steps(spread, context.shard(everything), adam(spread), average=True)
    folder = Path(tempfile.gettempdir()) / f"ssa-distributed-{os.environ['MASTER_PORT']}"
    save_checkpoint(folder, fsdp, optimizer, 3)
    again = sharded()
    resumed = adam(again)
    step = load_checkpoint(folder, again, resumed)
    more, same = (steps(m, batch, o, average=True) for m, o in ((fsdp, optimizer), (again, resumed)))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    assert step == 3
    shape = Shape(config.num_heads, config.kv_heads, config.head_dim, torch.float32, (tokens.shape[1],))
    for name, losses in {**found, "FSDP2, went on": more, "FSDP2, resumed": same}.items():
        say(f"    {name:16} losses {', '.join(f'{x:.6f}' for x in losses)}")
    pairs = {name: (losses, found["one process"], 1e-5, 2e-3) for name, losses in found.items()}
    pairs.pop("one process")
    pairs["FSDP2 resumed from a checkpoint, against the run that went on"] = (same, more, 0.0, 1e-5)
    for name, (losses, wanted, on_cpu, on_gpu) in pairs.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        yield checked("small model", name, "3 steps", shape, tokens.shape[1], worst, on_cpu, on_gpu, device)


# -- times and bytes --------------------------------------------------------------------------------------------------


def random_parts(shape: Shape, length: int, context: ContextParallel, device: torch.device) -> list[Tensor]:
    """This rank's part of random queries, keys and values; all ranks draw from one stream, piece by piece."""
    options = {"device": device, "dtype": shape.dtype}
    local = length // context.ranks.size
    generator = torch.Generator(device).manual_seed(context.ranks.rank)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [torch.randn((1, h, local, shape.head_dim), generator=generator, **options) for h in heads]


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median milliseconds between two moments at which all ranks are there."""
    times: list[float] = []
    call()
    begin = time.perf_counter()
    while len(times) < 3 or (largest(time.perf_counter() - begin, device) < seconds and len(times) < 20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def all_gather_bytes(shape: Shape, length: int, ranks: int, mode: str) -> int:
    """What a rank receives where all keys and values are gathered; their gradients come back as parts of as many."""
    once = 2 * (length - length // ranks) * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    return once * (2 if mode == "forward+backward" else 1)


def time_case(
    name: str, shape: Shape, length: int, mode: str, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """One process, all-gather and context parallelism, of one case."""
    context = ContextParallel.over(None)
    parts = random_parts(shape, length, context, device)
    whole = [context.unshard(x, 2) for x in parts]
    backward = mode == "forward+backward"
    config = MIXES[name].replace(causal=True)
    attend: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "one process": (lambda: sparse_attention(*whole, config=config, enable_gqa=True), whole),
        "all-gather": (lambda: all_gather_attention(*parts, context, config), parts),
        "context parallel": (lambda: context_parallel_attention(*parts, context, config=config), parts),
    }
    wanted: Tensor | None = None
    for method, (forward, inputs) in attend.items():
        for x in inputs:
            x.requires_grad_(backward)

        def call(forward: Callable[[], Tensor] = forward, inputs: list[Tensor] = inputs) -> Tensor:
            for x in inputs:
                x.grad = None
            out = forward()
            if backward:
                out.backward(torch.ones_like(out))
            return out.detach()

        with count_traffic() as traffic:
            result = call()
        received = dict(traffic.received) if method == "context parallel" else {}
        total = all_gather_bytes(shape, length, context.ranks.size, mode)
        mine = {"one process": 0, "all-gather": total, "context parallel": sum(received.values())}[method]
        bytes_received = int(largest(mine, device))
        row = {
            "mix": name,
            "data": "random",
            "method": method,
            "mode": mode,
            "milliseconds": round(timed(call, device, seconds), 3),
            "bytes_received": bytes_received,
            "bytes_of_all_gather": total,
            "share_of_all_gather": round(bytes_received / total, 4) if total else "",
            "bytes_by_purpose": received or "",
        }
        if wanted is None:
            wanted = context.shard(result, 2).float()
        else:
            apart = result.float() - wanted
            changed = (apart.norm(dim=-1) > 0.05 * wanted.norm(dim=-1)).float().mean()
            row["rows_changed"] = f"{largest(float(changed), device):.2e}"
            row["difference"] = f"{largest(float(apart.norm() / wanted.norm()), device):.2e}"
        yield row | _facts(shape, length, context.ranks.size, device)


def _facts(shape: Shape, length: int, ranks: int, device: torch.device | str) -> dict[str, Any]:
    processor = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "CPU, gloo"
    return {
        "length": length,
        "ranks": ranks,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": processor,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(row: dict[str, Any]) -> str:
    taken = f"{row['milliseconds']:9.2f} ms" if row.get("milliseconds") else ""
    difference = f"  difference {row['difference']}, rows changed {row['rows_changed']}" if "difference" in row else ""
    mebibytes = row["bytes_received"] / 2**20
    share = row["share_of_all_gather"] or 0.0
    return (
        f"{row['mix']:16} {row['data']:12} {row['length']:8} on {row['ranks']:3} {row['mode']:17} {row['method']:17}"
        f"{taken}  {mebibytes:9.2f} MiB = {share:.3f} of all-gather{difference}"
    )


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# -- counting for more ranks than there are ---------------------------------------------------------------------------


def count_case(name: str, data: str, whole: list[Tensor], ranks: int) -> dict[str, Any]:
    """Bytes of one forward call on ranks that are threads."""
    config = MIXES[name].replace(causal=True)

    def attend(rank: Any) -> Counter[str]:
        context = ContextParallel(rank, "zigzag")
        with torch.no_grad():
            context_parallel_attention(*(context.shard(x, 2) for x in whole), context, config=config)
        return rank.traffic

    traffic = run_ranks(ranks, attend)
    most = max(traffic, key=lambda t: sum(t.values()))
    q, k, _ = whole
    shape = Shape(q.shape[1], k.shape[1], q.shape[3], q.dtype, ())
    total = all_gather_bytes(shape, q.shape[2], ranks, "forward")
    return {
        "mix": name,
        "data": data,
        "method": "context parallel",
        "mode": "forward",
        "bytes_received": sum(most.values()),
        "bytes_of_all_gather": total,
        "share_of_all_gather": round(sum(most.values()) / total, 4),
        "bytes_by_purpose": dict(most),
    } | _facts(shape, q.shape[2], ranks, "threads")


def count(captures: list[Path], lengths: list[int], worlds: list[int], mixes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        data: list[tuple[str, list[Tensor]]] = []
        for path in captures:
            stored = torch.load(path, weights_only=True)
            data.append((path.stem, [stored[x][None, :, :length].bfloat16() for x in "qkv"]))
        if not captures:
            generator = torch.Generator().manual_seed(0)
            data.append(
                ("random", [torch.randn((1, h, length, 64), generator=generator).bfloat16() for h in (8, 2, 2)])
            )
        for ranks in worlds:
            for name in mixes:
                for where, whole in data:
                    rows.append(count_case(name, where, whole, ranks))
                    print(describe(rows[-1]), flush=True)
    return rows


def main(
    out: Annotated[Path | None, typer.Option(help="CSV file")] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="tokens, of all ranks together")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PARTS)}; all if left out")] = None,
    check: Annotated[list[str] | None, typer.Option(help="sources that are checked; all if left out")] = None,
    mixes: Annotated[list[str] | None, typer.Option(help="mixes that are timed")] = None,
    seconds: Annotated[float, typer.Option(help="of readings per case")] = 1.0,
    stop_after: Annotated[float, typer.Option(help="time no further case after so many seconds")] = 200.0,
    count_only: Annotated[bool, typer.Option("--count", help="count bytes with threads, without torchrun")] = False,
    worlds: Annotated[list[int] | None, typer.Option(help="with --count: numbers of ranks")] = None,
    capture: Annotated[list[Path] | None, typer.Option(help="with --count: vectors of a model")] = None,
) -> None:
    """Check, time and count context parallelism."""
    results = Path(__file__).parent / "results"
    if count_only:
        counted = count(capture or [], lengths or [8192], worlds or [2, 4, 8, 16], mixes or list(MIXES))
        write(counted, out or results / "distributed_bytes.csv")
        return
    begin = time.perf_counter()
    local = int(os.environ.get("LOCAL_RANK", "-1"))
    if local < 0:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 2 benchmarks/distributed.py")
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=120))
    shape = WIDE if on_gpus else NARROW
    path = out or results / ("distributed_nccl.csv" if on_gpus else "distributed_cpu.csv")
    rows: list[dict[str, Any]] = []

    def keep(new: Iterable[dict[str, Any]]) -> None:
        for row in new:
            rows.append(row)
            if dist.get_rank() == 0:
                write(rows, path)
            if "fine" not in row:
                say(describe(row))
        if on_gpus:
            torch.cuda.empty_cache()

    parts = part or PARTS
    if "checks" in parts:
        keep(check_attention(device, check or list(SMALL)))
        say(f"[{time.perf_counter() - begin:.0f} s]")
    if "model" in parts:
        keep(check_model(device))
        say(f"[{time.perf_counter() - begin:.0f} s]")
    cases = [(mode, length, name) for length in lengths or shape.lengths for mode in MODES for name in mixes or MIXES]
    start = time.perf_counter()
    for mode, length, name in cases if "times" in parts else ():
        if largest(time.perf_counter() - start, device) > stop_after:
            say(f"stopped after {stop_after:.0f} s; {name} at {length}, {mode}, and what follows not run")
            break
        keep(time_case(name, shape, length, mode, device, seconds))
    say(f"[{time.perf_counter() - begin:.0f} s]")
    dist.barrier()
    dist.destroy_process_group()
    wrong = sum(not row.get("fine", True) for row in rows)
    if wrong:
        raise SystemExit(f"{wrong} checks failed")


if __name__ == "__main__":
    typer.run(main)
