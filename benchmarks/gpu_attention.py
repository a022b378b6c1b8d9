"""Times the Triton kernels of `neighbor_attention` on one GPU, against torch's dense attention, and checks them first.

    python benchmarks/gpu_attention.py [--csv FILE] [--longest N]

Checked: forward, lse and all gradients against the torch implementation in float64, at odd sizes; equal bits from run
to run; capture in a CUDA graph; rows of a tensor of more than 2^31 elements. Timed: medians over CUDA events, causal,
bfloat16, window of 8, 2 columns and K listed keys, of two kinds of lists: ``mixed`` (half of the keys recent and shared
by 16 neighbouring queries, half anywhere before) and ``random`` (all of them anywhere before: the worst case).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa_framework import NeighborGraph
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.proposals import Band

WINDOW, COLUMNS, SLOTS, TILE, RECENT = 8, 2, 118, 16, 256
MEASURED, WARM_UP, SLOW_MS = 20, 3, 100.0


def tensors(length: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(batch, h, length, dim) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, device="cuda", dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def random_graph(length: int, heads: int, graph_heads: int, kind: str, causal: bool = True) -> NeighborGraph:
    """A graph like a router's: ascending lists, -1 in what causality or chance left empty."""
    generator = torch.Generator("cuda").manual_seed(length)
    recent = SLOTS // 2 if kind == "mixed" else 0
    columns = torch.arange(COLUMNS, dtype=torch.int32, device="cuda")
    lists = torch.empty((1, graph_heads, length, SLOTS), dtype=torch.int32, device="cuda")
    position = torch.arange(length, device="cuda")
    end = (position - WINDOW - (RECENT + TILE if recent else 0)).clamp(min=0) if causal else position * 0 + length
    tiles = -(-length // TILE)
    for head in range(graph_heads):  # head by head, to stay small
        far = torch.rand((length, SLOTS - recent), device="cuda", generator=generator) * end[:, None]
        back = torch.rand((tiles, RECENT), device="cuda", generator=generator).argsort(-1)[:, :recent]
        near = (torch.arange(tiles, device="cuda")[:, None] * TILE - WINDOW - 1 - back).repeat_interleave(TILE, 0)
        keys = torch.cat([near[:length].clamp(min=-1), far.long()], dim=-1).int().sort(-1).values
        keys[:, 1:][keys[:, 1:] == keys[:, :-1]] = -1
        after = WINDOW * (not causal)
        inside = (keys >= position[:, None] - WINDOW) & (keys <= position[:, None] + after)
        late = keys > position[:, None] + (0 if causal else length)
        lists[0, head] = keys.masked_fill(inside | late | (keys < COLUMNS), -1)
    mask = make_edge_mask(batch=1, heads=heads, queries=length, keys=length, device=lists.device, causal=causal)
    band = Band(WINDOW, 0 if causal else WINDOW)
    return NeighborGraph(1, heads, graph_heads, length, mask, band=band, columns=columns, neighbors=lists)


def attend(q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph, backend: str = "triton") -> Tensor:
    return neighbor_attention(q, k, v, graph, backend=backend)[0]


def results(inputs: list[Tensor], graph: NeighborGraph, backend: str, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    out, lse = neighbor_attention(*inputs, graph, backend=backend)
    total = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(total, inputs)]


def check(length: int, heads: tuple[int, int], graph_heads: int, dim: int, dtype: torch.dtype, causal: bool) -> None:
    """Raises where the kernels are further from float64 than their dtype explains, or differ from run to run."""
    inputs = tensors(length, heads, dim, dtype)
    graph = random_graph(length, heads[0], graph_heads, "mixed", causal)
    grads = (torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device="cuda"))
    got = results(inputs, graph, "triton", grads)
    want = results([x.detach().double().requires_grad_() for x in inputs], graph, "torch", grads)
    errors = [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)]
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    name = f"{heads[0]}/{heads[1]} heads x {dim}, {graph_heads} lists, N = {length}, {dtype}, causal = {causal}"
    print(f"  {name}: errors " + " ".join(f"{e:.1e}" for e in errors), flush=True)
    if not max(errors) < bound:
        raise SystemExit(f"{name}: error {max(errors)} is above {bound}")
    again = results(inputs, graph, "triton", grads)
    if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        raise SystemExit(f"{name}: two runs gave different bits")


def check_graph_capture() -> None:
    inputs, graph = tensors(1024, (8, 2), 64, torch.bfloat16), random_graph(1024, 8, 2, "mixed")
    grad = torch.randn_like(inputs[0])

    def step() -> list[Tensor]:
        out = attend(*inputs, graph)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = [x.clone() for x in step()]
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step()
    for x in got:
        x.detach().zero_()
    captured.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
        raise SystemExit("a replayed CUDA graph differs from the call")
    print("  forward and backward captured in a CUDA graph: equal bits")


def check_long(length: int = 2**20) -> None:
    """The last rows of q [1, 32, 2^20, 128] (2^32 elements) against a call of these rows alone; time and memory."""
    inputs, graph = tensors(length, (32, 8), 128, torch.bfloat16), random_graph(length, 32, 8, "mixed")
    grad = torch.randn_like(inputs[0])
    torch.cuda.reset_peak_memory_stats()
    out = attend(*inputs, graph)
    q, k, v = (x.detach() for x in inputs)
    rows = slice(length - 100, length)
    masked = replace(graph, mask=graph.mask.rows(rows), neighbors=graph.neighbors[:, :, rows])
    part = attend(q[:, :, rows], k, v, masked, "torch")
    error = float((out[:, :, rows].float() - part.float()).norm() / part.float().norm())
    forward = median(lambda: attend(q, k, v, graph), 3)
    backward = median(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), 2)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"  N = {length}: forward {forward:.0f} ms, backward {backward:.0f} ms, error {error:.1e}, {memory:.0f} GiB")
    if not error < 8e-3:
        raise SystemExit("rows beyond 2^31 elements are wrong")


def median(call: Callable[[], object], repeats: int | None = None) -> float:
    """Milliseconds on the GPU; fewer repeats where one takes long, so that dense attention doesn't take minutes."""
    pairs = []
    for index in range(WARM_UP if repeats is None else 1):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        if index and repeats is None and first.elapsed_time(last) > SLOW_MS:
            repeats = 3
    for _ in range(repeats or MEASURED):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in pairs)
    return times[len(times) // 2]


def dense(inputs: list[Tensor], backend: SDPBackend, grad: Tensor) -> tuple[float, float]:
    def call() -> Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    with sdpa_kernel(backend):
        with torch.no_grad():
            forward = median(call)
        both = median(lambda: torch.autograd.grad(call(), inputs, grad))
    return forward, both


def measure(name: str, length: int, heads: tuple[int, int], graph_heads: int, dim: int) -> list[dict[str, object]]:
    inputs = tensors(length, heads, dim, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    cudnn = dense(inputs, SDPBackend.CUDNN_ATTENTION, grad)
    flash = dense(inputs, SDPBackend.FLASH_ATTENTION, grad) if length <= 32768 else (float("nan"), float("nan"))
    rows = []
    for kind in ("mixed", "random"):
        graph = random_graph(length, heads[0], graph_heads, kind)
        q, k, v = (x.detach() for x in inputs)
        forward = median(lambda q=q, k=k, v=v, graph=graph: attend(q, k, v, graph))
        both = median(lambda graph=graph: torch.autograd.grad(attend(*inputs, graph), inputs, grad))
        rows.append(
            {
                "case": name, "N": length, "lists": kind, "forward_ms": forward, "both_ms": both,
                "cudnn_forward_ms": cudnn[0], "cudnn_both_ms": cudnn[1],
                "flash_forward_ms": flash[0], "flash_both_ms": flash[1],
            }
        )  # fmt: skip
        print(
            f"| {name} | {length} | {kind} | {forward:.2f} | {both:.2f} | {cudnn[0]:.2f} | {cudnn[1]:.2f} | "
            f"{flash[0]:.2f} | {flash[1]:.2f} | {cudnn[0] / forward:.1f}x | {cudnn[1] / both:.1f}x |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--longest", type=int, default=131_072, help="the longest sequence to time")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("checks (relative errors of out, lse and the gradients of q, k, v)")
    for case in (
        (777, (32, 8), 8, 128, torch.bfloat16, True),
        (1001, (32, 8), 32, 128, torch.bfloat16, False),
        (1023, (8, 8), 8, 64, torch.float16, True),
        (515, (6, 2), 2, 96, torch.float32, False),
        (1025, (8, 1), 1, 256, torch.bfloat16, True),
        (300, (4, 4), 4, 32, torch.float32, True),
        (300, (8, 2), 2, 256, torch.float32, True),
    ):
        check(*case)
    check_graph_capture()
    if options.longest >= 131_072:
        check_long()
        torch.cuda.empty_cache()
    print("\n| heads | N | lists | forward | + backward | cuDNN | + backward | flash | + backward | forward | both |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for length in (16_384, 32_768, 65_536, 131_072):
        if length <= options.longest:
            rows += measure("32/8 x 128", length, (32, 8), 8, 128)
            rows += measure("8/8 x 64", length, (8, 8), 8, 64)
    if options.longest >= 32_768:
        rows += measure("32/8 x 128, a list per head", 32_768, (32, 8), 32, 128)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
