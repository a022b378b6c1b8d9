"""The parts of clustered routing on a GPU: checks the kernels of k-means, spans, whole slices and summaries, then times
steps.

Checked: k-means against torch, for every level of the presets and at odd sizes (who is with whom, how far keys are from
the means, equal bits twice and with other segments or far more keys in the call); attention over the graphs that the
presets build (out, lse, all gradients) against the torch implementation in float64, at odd sizes, padded and packed,
grouped and not; equal bits from run to run. Timed: the device time of every kernel of k-means by level, of routing,
forward and backward at some lengths, from torch's profiler.

    python benchmarks/gpu_clusters.py --length 32768 --length 131072
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Annotated
from unittest import mock

import torch
import triton
import typer
from gpu import MIXES, PRESETS, attend, tensors
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssa_framework import NeighborGraph, SSAConfig, build_graph
from ssa_framework.ops.cluster_keys import Clusters, cluster_keys, cluster_members, triton_cuda
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
    yield "preset quality", 8999, (4, 2), 128, torch.bfloat16, "plain", True


def levels(mix: str) -> list[tuple[int, int]]:
    """Keys of a segment and clusters of it, of each level of a preset."""
    return [(length, round(length / size)) for length, size in MIXES[mix].sources["clusters"]["levels"]]


def segment_keys(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Groups of keys around 32 points, away from zero."""
    generator = torch.Generator("cuda").manual_seed(shape[2])
    options = {"device": "cuda", "generator": generator}
    points = 1 + torch.randn((32, shape[3]), **options)
    return (points[torch.randint(32, shape[:3], **options)] + torch.randn(shape, **options)).to(dtype)


def distances(k: Tensor, found: Clusters, numbers: Tensor) -> tuple[float, float]:
    """Of the keys that are in clusters: the mean of their squared distances from the mean of their cluster, in float64;
    and how far the centroids are from those means, relatively."""
    used = numbers >= 0
    slots = found.size.shape[2]
    index = numbers.clamp(min=0).long()[..., None].expand(-1, -1, -1, k.shape[3])
    rows = torch.where(used[..., None], k.double(), 0.0)
    means = torch.zeros((*k.shape[:2], slots, k.shape[3]), dtype=torch.float64, device=k.device)
    means = means.scatter_add_(2, index, rows) / found.size.clamp(min=1)[..., None]
    apart = torch.where(used[..., None], rows - means.gather(2, index), 0.0)
    error = (found.centroids.double() - means).norm() / means.norm()
    return float(apart.square().sum() / used.sum()), float(error)


def check_k_means(length: int, clusters: int, dim: int, dtype: torch.dtype) -> None:
    """Raises where segments are clustered otherwise than in torch, or than alone."""
    name = f"k-means, {clusters} clusters of {length} keys x {dim}, {dtype}"
    k = segment_keys((2, 2, 2 * length + 37, dim), dtype)
    first = length + 37
    starts = torch.tensor([[5, -1, first], [0, length + 9, -1]], dtype=torch.int32, device="cuda")
    call = functools.partial(cluster_keys, length=length, clusters=clusters)
    figures = []
    for iterations, coarse in ((0, 0), (1, 0), (3, 1)):
        options = {"iterations": iterations, "coarse": coarse, "capacity": length}
        found, wanted = (call(k, starts, backend=backend, **options) for backend in ("triton", "torch"))
        got, want = (cluster_members(x.order, x.start, x.size, k.shape[2]) for x in (found, wanted))
        ordered, order = (x.order.view(2, 2, 3, length).sort(-1).values for x in (found, wanted))
        if not torch.equal(ordered, order) or not torch.equal(got >= 0, want >= 0):
            raise SystemExit(f"{name}, {iterations} steps: the clusters do not hold the keys of the segments")
        same = float((got == want)[want >= 0].float().mean())
        near, error = distances(k, found, got)
        ratio = near / distances(k, wanted, want)[0]
        figures.append(f"{iterations} steps: same cluster {same:.6f}, distances {ratio:.6f}, means {error:.1e}")
        # near ties part ways, and the more so after each step; the distances hardly feel it
        if (iterations == 0 and same < 0.9995) or abs(ratio - 1) > 2e-3 or error > 1e-5:
            raise SystemExit(f"{name}: {figures[-1]}")
    print(f"  {name}: " + "; ".join(figures), flush=True)
    call = functools.partial(call, iterations=3, coarse=1, backend="triton")
    once, again = (call(k, starts) for _ in range(2))
    alone = call(k[:1, 1:, first : first + length].contiguous(), torch.zeros_like(starts[:1, :1]))
    slots = alone.size.shape[2]
    parts = ("order", "start", "size", "centroids", "variances")
    different = [part for part in parts if not torch.equal(getattr(once, part), getattr(again, part))]
    if different:
        print(f"{name}: two runs gave different bits in {', '.join(different)}")
        FAILURES.append(name)
    for part in ("size", "centroids", "variances"):
        if not torch.equal(getattr(once, part)[:1, 1:, 2 * slots :], getattr(alone, part)):
            raise SystemExit(f"{name}: {part} of a segment depend on what else is in the call")


def check_far_keys() -> None:
    """Raises where the last of more than 2**32 coordinates are clustered otherwise than alone."""
    length, clusters = 2048, 256
    k = torch.empty((1, 33, 2**20, 128), dtype=torch.bfloat16, device="cuda")
    for head in k[0]:
        head.normal_()
    starts = torch.arange(0, k.shape[2], length, dtype=torch.int32, device="cuda")[None, -3:].contiguous()
    found = cluster_keys(k, starts, length, clusters, iterations=2, backend="triton")
    alone = cluster_keys(k[:, -1:, -length:].contiguous(), starts[:, :1] * 0, length, clusters, iterations=2)
    slots = alone.size.shape[2]
    for part in ("size", "centroids", "variances"):
        if not torch.equal(getattr(found, part)[:, -1:, -slots:], getattr(alone, part)):
            raise SystemExit(f"k-means of the last of {k.numel()} coordinates: other {part} than alone")
    print(f"  k-means of the last of {k.numel()} coordinates: as alone", flush=True)


def k_means_cases() -> Iterator[tuple[int, int, int, torch.dtype]]:
    """Keys of a segment, clusters, coordinates: the levels of the presets, then odd ones."""
    for length, clusters in sorted({level for preset in PRESETS for level in levels(preset)}):
        yield length, clusters, 128, torch.bfloat16
    yield 3001, 1000, 64, torch.bfloat16
    yield 2999, 300, 96, torch.float16
    yield 2048, 256, 128, torch.float32
    yield 1501, 600, 40, torch.float32
    yield 1000, 130, 200, torch.bfloat16
    yield 1000, 130, 256, torch.float32


def k_means(mix: str, tokens: int) -> None:
    """Times the kernels of each level of a preset; where programs hold all centroids, with chunks of them too."""
    k = tensors(tokens)[1]
    iterations = MIXES[mix].sources["clusters"].get("iterations", 5)
    call = functools.partial(cluster_keys, k, iterations=iterations, coarse=max(0, iterations - 2))
    for length, clusters in levels(mix):
        starts = torch.arange(0, tokens - length + 1, length, dtype=torch.int32, device="cuda")[None]
        title = f"{mix}, {tokens}, k-means, {clusters} clusters of {length} keys"
        level = functools.partial(call, starts=starts, length=length, clusters=clusters)
        report(title, level)
        if clusters <= 128:
            with mock.patch.object(triton_cuda, "_MAX_CENTROIDS", 0):
                report(f"{title}, in chunks", level)


TILES = [(128, 64, 16, 2), (128, 64, 32, 2), (128, 64, 16, 3), (64, 64, 16, 2), (128, 128, 16, 2), (256, 64, 32, 2)]
"""Keys of a tile, centroids of a chunk, keys of a warp, chunks on their way."""


def tune(mix: str, tokens: int) -> None:
    """Times the kernel that compares keys with chunks of centroids, with other tiles, on the levels that it serves."""
    k = tensors(tokens)[1]
    many = [level for level in levels(mix) if level[1] > 128]
    for rows, chunk, warp, stages in TILES:
        taken = []
        changed = {"_rows": lambda _, rows=rows: rows, "_CHUNK": chunk, "_ROWS_OF_A_WARP": warp, "_STAGES": stages}
        with mock.patch.multiple(triton_cuda, **changed):
            for length, clusters in many:
                starts = torch.arange(0, tokens - length + 1, length, dtype=torch.int32, device="cuda")[None]
                call = functools.partial(cluster_keys, k, starts, length, clusters, iterations=3, coarse=1)
                try:
                    taken.append(f"{sum(t for name, (t, _) in kernel_times(call).items() if 'nearest' in name):.3f} ms")
                except triton.runtime.errors.OutOfResources:
                    taken.append("too large")
        print(
            f"  {rows} keys, {rows // warp} warps, chunks of {chunk}, {stages} stages: {', '.join(taken)}", flush=True
        )


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
    tiles: Annotated[bool, typer.Option(help="only time the tiles of k-means with many centroids")] = False,
) -> None:
    """Check and profile the kernels of clusters on the GPU."""
    if checks:
        for k_means_case in k_means_cases():
            check_k_means(*k_means_case)
        check_far_keys()
        torch.cuda.empty_cache()
        for case in cases():
            check(*case)
    for tokens in length or [32768, 131072]:
        if tiles:
            for name in mix or ["preset balanced", "preset quality"]:
                print(f"{name}, {tokens}, {', '.join(str(level) for level in levels(name) if level[1] > 128)}:")
                tune(name, tokens)
            continue
        for name in mix or ["lean", "preset fast", "preset balanced", "preset quality"]:
            if name in PRESETS:
                k_means(name, tokens)
            steps(name, tokens, MIXES[name], False, (32, 8, 128))
            if backward:
                steps(name, tokens, MIXES[name], True, (32, 8, 128))
            torch.cuda.empty_cache()
    if FAILURES:
        raise SystemExit(f"not the same bits twice: {', '.join(FAILURES)}")


if __name__ == "__main__":
    typer.run(main)
