"""torch.compile of sparse attention: is it one piece, how often is it compiled, what does it cost and gain?

For a layer and a small model of each mix: compiles with ``fullgraph=True, dynamic=True``, calls the program with 20
lengths and counts compilations and graph breaks, compares outputs and gradients with eager, and times both in turn.
Routing compares numbers, so behind the first layer, where a compiled program rounds differently, a few queries get
other neighbors: ``rounding_difference`` is how far eager's own results move when every input moves by one unit in the
last place, and a program may differ by a few times that.
On CUDA also captures the layer in a CUDA graph, replays it on new data, and runs ``mode="reduce-overhead"``. Writes one
CSV row for each; a row says ``error`` where something failed, and the status is 1 then.

    python benchmarks/compile.py --out benchmarks/results/compile.csv
    python benchmarks/compile.py --device cuda --out compile_cuda.csv
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from recall import commit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ssa_framework
from ssa_framework import SparseAttention, SparseTransformer, SSAConfig

COLUMNS = [
    "what", "mix", "mode", "compile_s", "compilations", "graph_breaks", "largest_difference", "rounding_difference",
    "length", "eager_ms", "compiled_ms", "ratio", "cuda_graph_ms", "error", "threads", "device", "version", "commit",
    "torch",
]  # fmt: skip
LENGTHS = tuple(range(300, 1300, 50))
WIDTH, HEADS, LAYERS = 256, 8, 2
_FEW_TIMES = 4
"""By so many times the difference of a rounding may programs differ from eager."""


def build(what: str, mix: str, device: str, dtype: torch.dtype) -> nn.Module:
    options = {"d_model": WIDTH, "num_heads": HEADS, "causal": True, "dense_below": 0}
    config = SSAConfig(**options) if mix == "default" else SSAConfig.preset(mix, **options)
    torch.manual_seed(0)
    if what == "layer":
        return SparseAttention(config).to(device, dtype)
    return SparseTransformer(config, num_layers=LAYERS).to(device, dtype)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def in_turn(calls: list[Callable[[], object]], device: str, rounds: int) -> list[float]:
    """Medians in milliseconds, and of each round's ratio to the first."""
    for call in calls:
        call()
    times = [[seconds(call, device) for call in calls] for _ in range(rounds)]
    return [1e3 * median(one[i] for one in times) for i in range(len(calls))] + [
        median(one[0] / one[i] for one in times) for i in range(1, len(calls))
    ]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest one, relative to the largest number of the tensor."""
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-9)) for x, y in zip(a, b, strict=True))


def rounded_otherwise(x: Tensor) -> Tensor:
    """``x`` with every number moved by one unit in the last place, up or down at random."""
    towards = torch.where(torch.rand(x.shape, device=x.device) < 0.5, -torch.inf, torch.inf).to(x.dtype)
    return torch.nextafter(x, towards)


def gradients(run: Callable[..., tuple[Tensor, object]], module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    out = run(leaf)[0]
    weight = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape)  # a mean of squares would be
    (out.float() * weight).mean().backward()  # the same whatever goes through a normalisation
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def cuda_graph(layer: nn.Module, x: Tensor) -> tuple[Callable[[], object], float]:
    """A replay of the captured layer, and how far its results on new data are from eager's."""
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            layer(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(static)[0]
    static.copy_(torch.randn_like(x))
    graph.replay()
    with torch.no_grad():
        return graph.replay, difference([out], [layer(static)[0]])


def measure(
    what: str, mix: str, mode: str, device: str, dtype: torch.dtype, length: int, rounds: int
) -> dict[str, object]:
    torch._dynamo.reset()
    counters.clear()
    module = build(what, mix, device, dtype)
    training = mode == "training"
    module.train(training)
    overhead = "reduce-overhead" if mode == "reduce-overhead" else None
    program = torch.compile(module, fullgraph=True, dynamic=overhead is None, mode=overhead)
    lengths = (length, length + 128) if overhead else LENGTHS

    def run(call: Callable[..., tuple[Tensor, object]], x: Tensor) -> list[Tensor]:
        if training:
            return gradients(call, module, x)
        with torch.no_grad():
            return [call(x)[0].clone()]

    def inputs(n: int) -> Tensor:
        return torch.randn(1, n, WIDTH, device=device, dtype=dtype)

    run(module, inputs(lengths[0]))  # kernels are compiled before the clock runs
    first = seconds(lambda: run(program, inputs(lengths[0])), device)
    again = seconds(lambda: run(program, inputs(lengths[0])), device)
    worst = rounding = 0.0
    for n in lengths:
        x = inputs(n)
        eager = run(module, x)
        worst = max(worst, difference(run(program, x), eager))
        rounding = max(rounding, difference(run(module, rounded_otherwise(x)), eager))
    x = inputs(length)
    eager_ms, compiled_ms, ratio = in_turn([lambda: run(module, x), lambda: run(program, x)], device, rounds)
    row: dict[str, object] = {
        "compile_s": f"{first - again:.1f}",
        "compilations": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "largest_difference": f"{worst:.1e}",
        "rounding_difference": f"{rounding:.1e}",
        "length": length,
        "eager_ms": f"{eager_ms:.2f}",
        "compiled_ms": f"{compiled_ms:.2f}",
        "ratio": f"{ratio:.2f}",
    }
    if device.startswith("cuda") and mode == "inference":
        replay, apart = cuda_graph(module, x)
        row["cuda_graph_ms"] = f"{in_turn([replay], device, rounds)[0]:.2f}"
        worst = max(worst, apart)
        row["largest_difference"] = f"{worst:.1e}"
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    if worst > max(limit, _FEW_TIMES * rounding):
        row["error"] = f"differs by more than {limit} and {_FEW_TIMES} times what rounding does"
    elif row["graph_breaks"] or (overhead is None and row["compilations"] != 1):
        row["error"] = "more than one piece or compilation"
    return row


def write(path: Path, found: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    length: Annotated[int, typer.Option(help="tokens of the timed call")] = 2048,
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 9,
    mixes: Annotated[str, typer.Option(help="default or presets, separated by commas")] = "default,balanced",
    out: Annotated[Path | None, typer.Option(help="CSV file")] = None,
) -> None:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    modes = ["inference", "training"] + (["reduce-overhead"] if device.startswith("cuda") else [])
    stamp = {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }
    found: list[dict[str, object]] = []
    for what in ("layer", "model"):
        for mix in mixes.split(","):
            for mode in modes:
                row: dict[str, object] = {"what": what, "mix": mix, "mode": mode}
                try:
                    row |= measure(what, mix, mode, device, dtype, length, rounds)
                except Exception as error:  # noqa: BLE001 - the other rows are worth having
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                found.append(row | stamp)
                print(row, flush=True)
                if out is not None:
                    write(out, found)  # each row took minutes
    table = Table(*COLUMNS[:14])
    for row in found:
        table.add_row(*(str(row.get(name, "")) for name in COLUMNS[:14]))
    Console(width=180).print(table)
    sys.exit(any(row.get("error") for row in found))


if __name__ == "__main__":
    typer.run(main)
