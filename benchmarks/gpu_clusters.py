"""The parts of clustered routing on a GPU: checks the kernels of spans, whole slices and summaries, then times steps.

Checked: attention over the graphs that the presets build (out, lse, all gradients) against the torch implementation in
float64, at odd sizes, padded and packed, grouped and not; equal bits from run to run. Timed: the device time of every
kernel of routing, forward and backward at some lengths, from torch's profiler.

    python benchmarks/gpu_clusters.py --length 32768 --length 131072
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from gpu import MIXES, attend, tensors
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssa_framework import NeighborGraph, SSAConfig, build_graph
from ssa_framework.ops.neighbor_attention import neighbor_attention

BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative errors against float64 that rounding explains; summaries are rounded to the dtype of the keys."""


FAILURES: list[str] = []
"""Names of the cases that gave other bits the second time."""


def results(inputs: list[Tensor], graph: NeighborGraph, backend: str, upstream: tuple[Tensor, Tensor]) -> list[Tensor]:
    out, lse = neighbor_attention(*inputs, graph, backend=backend)
    seen = torch.isfinite(lse)
    total = (out * upstream[0].to(out.dtype)).sum() + (lse[seen] * upstream[1][seen].to(lse.dtype)).sum()
    return [out, lse.where(seen, 0.0), *torch.autograd.grad(total, inputs)]


def masks(kind: str, length: int) -> dict[str, Tensor]:
    """Arguments of `build_graph`: left padding, or documents of uneven lengths."""
    if kind == "padded":
        keep = torch.ones((2, length), dtype=torch.bool, device="cuda")
        keep[1, : length // 5] = False
        return {"attn_mask": keep[:, None, None, :]}
    if kind == "packed":
        ends = torch.tensor([length // 7, length // 2, length], device="cuda")
        return {"segment_ids": torch.searchsorted(ends, torch.arange(length, device="cuda"), right=True)[None]}
    return {}


def check(mix: str, length: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, kind: str, causal: bool) -> None:
    """Raises where the kernels are further from float64 than their dtype explains, or differ from run to run."""
    batch = 2 if kind == "padded" else 1
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(batch, h, length, dim) for h in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(s, device="cuda", dtype=dtype, generator=generator).requires_grad_() for s in shapes]
    config = MIXES[mix].replace(dense_below=0)
    graph = build_graph(inputs[0], inputs[1], config=config, is_causal=causal, **masks(kind, length))
    upstream = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device="cuda")
    got = results(inputs, graph, "triton", upstream)
    want = results([x.detach().double().requires_grad_() for x in inputs], graph, "torch", upstream)
    errors = [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)]
    name = f"{mix}, {heads[0]}/{heads[1]} heads x {dim}, N = {length}, {dtype}, {kind}, causal = {causal}"
    print(f"  {name}: errors " + " ".join(f"{e:.1e}" for e in errors), flush=True)
    if not max(errors) < BOUNDS[dtype]:
        raise SystemExit(f"{name}: error {max(errors)} is above {BOUNDS[dtype]}")
    again = results(inputs, graph, "triton", upstream)
    names = ("out", "lse", "q", "k", "v")
    different = [what for what, a, b in zip(names, got, again, strict=True) if not torch.equal(a, b)]
    if different:
        print(f"{name}: two runs gave different bits in {', '.join(different)}")
        FAILURES.append(name)


def cases() -> Iterator[tuple[str, int, tuple[int, int], int, torch.dtype, str, bool]]:
    yield "preset balanced", 4999, (8, 2), 128, torch.bfloat16, "plain", True
    yield "preset fast", 5003, (4, 4), 64, torch.float16, "plain", True
    yield "preset balanced", 3001, (4, 2), 96, torch.float32, "plain", True
    yield "preset balanced", 4001, (4, 2), 64, torch.bfloat16, "padded", True
    yield "preset fast", 4999, (4, 1), 64, torch.bfloat16, "packed", True
    yield "preset balanced", 3001, (4, 2), 64, torch.bfloat16, "plain", False


def kernel_times(call: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Milliseconds on the device and launches of each kernel of one call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            taken, launches = times[event.name[:60]]
            times[event.name[:60]] = taken + event.time_range.elapsed_us() / 1e3, launches + 1
    return dict(times)


def report(name: str, call: Callable[[], object]) -> None:
    times = kernel_times(call)
    total = sum(taken for taken, _ in times.values())
    print(f"{name}: {total:.2f} ms in {sum(count for _, count in times.values())} launches", flush=True)
    for kernel, (taken, count) in sorted(times.items(), key=lambda item: -item[1][0])[:14]:
        if taken > 0.01 * total:
            print(f"    {taken:8.3f} ms  {count:3} × {kernel}", flush=True)


def steps(mix: str, length: int, config: SSAConfig, backward: bool, shape: tuple[int, int, int]) -> None:
    q, k, v = (x.requires_grad_(backward) for x in tensors(length, *shape))
    config = config.replace(dense_below=0)
    graph = build_graph(q, k, config=config, is_causal=True)
    upstream = torch.randn_like(q)

    def attention() -> object:
        out, _ = neighbor_attention(q, k, v, graph)
        return torch.autograd.grad(out, (q, k, v), upstream) if backward else out

    title = f"{mix}, {length}, {shape[0]}/{shape[1]} × {shape[2]}"
    if not backward:
        report(f"{title}, routing", lambda: build_graph(q, k, config=config, is_causal=True))
        attend(q, k, v, config)
    report(f"{title}, attention{', with backward' if backward else ''}", attention)


def main(
    length: Annotated[list[int] | None, typer.Option(help="tokens")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="of the mixes of gpu.py")] = None,
    backward: Annotated[bool, typer.Option(help="time gradients too")] = True,
    checks: Annotated[bool, typer.Option(help="check first")] = True,
) -> None:
    """Check and profile the kernels of clusters on the GPU."""
    if checks:
        for case in cases():
            check(*case)
    for tokens in length or [32768, 131072]:
        for name in mix or ["lean", "preset fast", "preset balanced"]:
            steps(name, tokens, MIXES[name], False, (32, 8, 128))
            if backward:
                steps(name, tokens, MIXES[name], True, (32, 8, 128))
            torch.cuda.empty_cache()
    if FAILURES:
        raise SystemExit(f"not the same bits twice: {', '.join(FAILURES)}")


if __name__ == "__main__":
    typer.run(main)
