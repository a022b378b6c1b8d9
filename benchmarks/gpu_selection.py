"""Selection on a GPU, from LSH slices alone and with candidate lists: check, then time, stage by stage.

    PYTHONPATH=.:plugins python benchmarks/gpu_selection.py [--lengths 16384 32768] [--data gaussian clustered] [--tune]

Every row of the table follows a check of the same configuration against the torch backend, on inputs whose products
are exact.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.select_neighbors import Proposed, Selection, select_neighbors, triton_cuda
from ssa_framework.ops.select_neighbors.types import Eligible
from ssa_framework.proposals import Band, Candidates, Ranges

REPEATS = 20


class Mix(NamedTuple):
    rounds: int
    slices: int
    limit: int
    per_bucket: int


MIXES = (Mix(8, 1, 128, 64), Mix(8, 4, 32, 16), Mix(12, 4, 40, 16))


def inputs(data: str, heads: int, length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    if data == "integers":
        return tuple(normal(1, heads, length, dim).round().to(dtype) for _ in range(2))  # type: ignore[return-value]
    if data == "gaussian":
        return tuple(normal(1, heads, length, dim).to(dtype) for _ in range(2))  # type: ignore[return-value]
    # groups of very different sizes, which queries and keys share
    weights = 1.0 / torch.arange(1, 257, device="cuda")
    centers = normal(heads, 256, dim)

    def grouped() -> Tensor:
        group = torch.multinomial(weights, length, replacement=True, generator=generator)
        return (centers[:, group] + 0.7 * normal(heads, length, dim))[None].to(dtype)

    return grouped(), grouped()


def lsh_ranges(q: Tensor, k: Tensor, mix: Mix, causal: bool = True) -> Ranges:
    """Signs of projections; each query uses as many as fit its position, one order per number of planes."""
    heads, length, dim = q.shape[1:]
    most = min(12, max(1, round(math.log2(k.shape[2] / mix.per_bucket))))
    generator = torch.Generator("cuda").manual_seed(1)
    planes = torch.randn((mix.rounds, most, dim), generator=generator, device="cuda")
    count = torch.arange(1, length + 1, device="cuda")
    level = torch.log2(count / mix.per_bucket).round().clamp(1, most).long() if causal else torch.full_like(count, most)
    start = torch.zeros((1, heads, length, mix.rounds, mix.slices), dtype=torch.int32, device="cuda")
    end = torch.zeros_like(start)
    orders, offset = [], 0
    for bits in level.unique().tolist():
        rows = (level == bits).nonzero()[:, 0]
        reach = int(rows[-1]) + 1 if causal else k.shape[2]
        parts = []
        powers = 2 ** torch.arange(bits, device="cuda")
        for h in range(heads):
            of_keys = torch.einsum("md,sfd->smf", k[0, h, :reach].float(), planes[:, :bits])
            codes = ((of_keys > 0) * powers).sum(-1)
            values, order = codes.sort(dim=-1, stable=True)
            of_rows = torch.einsum("nd,sfd->snf", q[0, h, rows].float(), planes[:, :bits])
            wanted = ((of_rows > 0) * powers).sum(-1)[..., None]
            if mix.slices > 1:  # flip the planes that the query is nearest to
                near = of_rows.abs().topk(min(mix.slices - 1, bits), dim=-1, largest=False).indices
                wanted = torch.cat([wanted, wanted ^ powers[near]], dim=-1)
            some = wanted.shape[-1]
            wanted = wanted.flatten(1).contiguous()
            for bound, right in ((start, False), (end, True)):
                found = torch.searchsorted(values, wanted, right=right).view(mix.rounds, rows.numel(), some)
                bound[0, h, rows, :, :some] = (found.movedim(0, 1) + offset).int()
            parts.append(order.int())
        orders.append(torch.stack(parts))
        offset += reach
    return Ranges(torch.cat(orders, dim=-1)[None], start, end, "topk", mix.limit)


def eligible(heads: int, length: int, causal: bool) -> Eligible:
    mask = make_edge_mask(batch=1, heads=heads, queries=length, keys=length, device=torch.device("cuda"), causal=causal)
    return Eligible(mask, heads, length, Band(9, 0 if causal else 9), torch.arange(1, dtype=torch.int32, device="cuda"))


def with_lists(q: Tensor, k: Tensor, lsh: Ranges) -> list[Proposed]:
    """LSH, with random keys, keys of a search index that has their scores, and edges (guaranteed; for all heads)."""
    heads, length = q.shape[1:3]
    generator = torch.Generator("cuda").manual_seed(2)

    def draw(*shape: int) -> Tensor:
        share = torch.rand((1, *shape), generator=generator, device="cuda")
        return (share * torch.arange(1, length + 1, device="cuda")[:, None]).int() - 1

    found = draw(heads, length, 32)
    scores = torch.empty(found.shape, device="cuda")
    for h in range(heads):
        rows = k[0, h, found[0, h].clamp(min=0).long()].float()  # [N, 32, D]
        scores[0, h] = (rows @ q[0, h, :, :, None].float())[..., 0]
    return [
        Proposed("lsh", lsh),
        Proposed("random", Candidates(draw(1, length, 24))),
        Proposed("index", Candidates(found, scores)),
        Proposed("edges", Candidates(draw(1, length, 8), guaranteed=True)),
    ]


def check(mix: Mix, dim: int, dtype: torch.dtype, causal: bool, budget: int, lists: bool) -> str:
    q, k = inputs("integers", 2, 3001, dim, dtype)
    lsh = lsh_ranges(q, k, mix, causal)
    proposed = with_lists(q, k, lsh) if lists else [Proposed("lsh", lsh)]
    keep = eligible(2, 3001, causal)
    got = select_neighbors(q, k, proposed, keep, budget, "triton")
    want = select_neighbors(q, k, proposed, keep, budget, "torch")

    def counts(selection: Selection) -> str:
        both = {p.source: (int(selection.listed[p.source]), int(selection.keys_scored[p.source])) for p in proposed}
        return ", ".join(f"{name} {listed} of {scored}" for name, (listed, scored) in both.items())

    if not torch.equal(got.neighbors, want.neighbors) or counts(got) != counts(want):
        wrong = (got.neighbors != want.neighbors).any(-1).sum()
        return f"WRONG: {int(wrong)} rows differ; listed of scored: {counts(got)}; torch: {counts(want)}"
    return "equal"


def median_ms(run: Callable[[], object], repeats: int = REPEATS) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(stop))
    return statistics.median(times)


def graph_ms(run: Callable[[], Selection]) -> float:
    """Of a captured graph, whose result must equal that of a plain call."""
    want = run().neighbors
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.neighbors.fill_(-7)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.neighbors, want), "a captured graph gives another result"
    return median_ms(graph.replay)


def stages(run: Callable[[], object]) -> str:
    """Time per kernel, ms; other kernels together."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in seen.key_averages():
        name = event.key if event.key.endswith("_kernel") and len(event.key) < 30 else "other"
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 5000
    return ", ".join(f"{name.removesuffix('_kernel').strip('_')} {ms:.3f}" for name, ms in sorted(times.items()))


def time_one(data: str, heads: int, length: int, dim: int, mix: Mix, lists: bool, tune: bool) -> None:
    q, k = inputs(data, heads, length, dim, torch.bfloat16)
    lsh = lsh_ranges(q, k, mix)
    proposed = with_lists(q, k, lsh) if lists else [Proposed("lsh", lsh)]
    keep = eligible(heads, length, True)

    def run() -> Selection:
        return select_neighbors(q, k, proposed, keep, 118, "triton")

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    scored = sum(int(x) for x in result.keys_scored.values()) / (heads * length)
    filled = sum(int(x) for x in result.listed.values()) / (heads * length)
    plain = median_ms(run, REPEATS if length < 300_000 else 3)
    captured = graph_ms(run) if length <= 65536 else float("nan")
    what = f"{mix.rounds}x{mix.slices}x{mix.limit}{' with lists' if lists else ''}"
    print(
        f"{data} N={length} D={dim} {what}: {plain:.3f} ms, captured {captured:.3f} ms, "
        f"peak {peak:.2f} GiB, {scored:.0f} scored and {filled:.0f} listed per query | {stages(run)}",
        flush=True,
    )
    if tune:
        vary(run, lists)


def vary(run: Callable[[], object], lists: bool) -> None:
    """The heavy kernels in other shapes."""
    tile, choose, merge = triton_cuda.score_tile, triton_cuda.choose_run, triton_cuda.merge_run
    for shape in SCORE_TILES:
        triton_cuda.score_tile = lambda *_, shape=shape: triton_cuda.ScoreTile(*shape)
        show("score", shape, run)
    triton_cuda.score_tile = tile
    for shape in CHOOSE_RUNS:
        triton_cuda.choose_run = lambda *_, shape=shape: triton_cuda.ChooseRun(*shape)
        show("choose", shape, run)
    triton_cuda.choose_run = choose
    for shape in MERGE_RUNS if lists else ():
        triton_cuda.merge_run = lambda *_, shape=shape: triton_cuda.MergeRun(*shape)
        show("merge", shape, run)
    triton_cuda.merge_run = merge


SCORE_TILES = (
    (64, 64, 4, 2, None), (64, 64, 4, 2, 168), (64, 32, 4, 2, 128), (64, 32, 4, 2, None), (64, 64, 8, 2, None),
    (64, 64, 8, 2, 128), (32, 64, 2, 2, None), (32, 32, 2, 2, None), (32, 32, 2, 2, 128), (64, 32, 2, 2, None),
    (16, 32, 1, 2, None), (32, 32, 1, 2, None), (64, 128, 8, 2, None), (64, 16, 4, 2, 128),
)  # fmt: skip
MERGE_RUNS = ((1, 8), (1, 16), (2, 16), (2, 32), (4, 16), (4, 32), (8, 32))
CHOOSE_RUNS = ((1, 96), (1, 80), (1, 64), (1, 48), (2, 64))


def show(what: str, shape: tuple[int | None, ...], run: Callable[[], object]) -> None:
    try:
        times = dict(part.rsplit(" ", 1) for part in stages(run).split(", "))
        print(f"    {what} {shape}: {times[what]}", flush=True)
    except Exception as error:  # noqa: BLE001 - a shape that does not fit the card is a result, too
        print(f"    {what} {shape}: {type(error).__name__} {str(error)[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--data", nargs="+", default=["gaussian", "clustered"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--mixes", type=int, default=len(MIXES))
    parser.add_argument("--tune", action="store_true")
    chosen = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for mix in MIXES[: chosen.mixes]:
        for dim, dtype, causal in (
            (128, torch.bfloat16, True), (64, torch.float16, False), (80, torch.float32, True),
        ):  # fmt: skip
            for lists in (False, True):
                what = " with lists" if lists else ""
                print(
                    f"check {mix}{what} D={dim} {dtype} causal={causal}: {check(mix, dim, dtype, causal, 118, lists)}",
                    flush=True,
                )
        for length in chosen.lengths:
            for data in chosen.data:
                tune = chosen.tune and (length, data) == (chosen.lengths[0], chosen.data[0])
                for lists in (False, True):
                    time_one(data, chosen.heads, length, 128, mix, lists, tune)


if __name__ == "__main__":
    main()
