"""One decode step on a cache beside one dense step, on a GPU: batch 1, 32 heads over 8 KV heads × 128, bfloat16.

Run by `decode.py --device cuda`. Steps are timed one by one with events, plain and captured (``replay=True``). Dense
is the fastest of torch's kernels that serve one query. The L2 cache is overwritten before every step, sparse or
dense, since other layers would do that. *Called*: from the first launch to the end of the last one, host included.
*Captured*: replays of CUDA graphs, for the dense step too, host included. *Device*: the same replays where the host is
ahead of the device, as in a model whose layers follow one another. A case is checked before it is timed: single
tokens, plain and captured, and chunks against one call with all tokens, and a step at full length against the backend
``torch`` in float32.

    python benchmarks/decode.py --device cuda --check-only --mix lsh --mix lean    # nothing but the first check
"""

from __future__ import annotations

import csv
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recall import commit
from torch import Tensor
from torch.nn.attention import SDPBackend

import ssa_framework
from ssa_framework import LayerCache, SSAConfig
from ssa_framework.decoding import attend_cached, captured_steps
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.quality.bench import under_kernel
from ssa_framework.router import Router

HEADS, KV_HEADS, DIM = 32, 8, 128
SAMPLE, CHECKED, STEPS, WARM_STEPS = 3000, 300, 100, 40
CHUNKS = (100, 1, 64, 15, 120)
MOST_OTHER_ROWS = 0.01
"""Share of the outputs of single heads that may differ under ``lsh``: kernels for many keys and for few round
projections in their own way, so that one that is next to zero may give a key another bit."""
KERNELS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
COLUMNS = [
    "length", "mix", "called_ms", "captured_ms", "device_ms", "dense_called_ms", "dense_captured_ms",
    "dense_device_ms", "dense_kernel", "speedup_called", "speedup_captured", "speedup_device",
    "largest_difference", "keys_attended", "replays", "message", "device", "version", "commit", "torch",
]  # fmt: skip


def config(sources: Mapping[str, Mapping[str, Any]]) -> SSAConfig:
    return SSAConfig(
        d_model=HEADS * DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, num_neighbors=128, causal=True,
        graph_heads="kv", sources=sources, dense_below=0,
    )  # fmt: skip


def random_tokens(length: int, seed: int) -> list[Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(1, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]


def check(sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where tokens, plain or captured, or chunks give anything else than one call."""
    tokens = random_tokens(SAMPLE, 0)
    router = Router(config(sources)).to(tokens[0].device)
    whole, _ = attend_cached(router, LayerCache(), *tokens)
    ways: dict[str, tuple[int, ...]] = {"tokens": (1,) * CHECKED, "chunks": CHUNKS, "captured": (1,) * CHECKED}
    for way, lengths in ways.items():
        cache, place = LayerCache(), SAMPLE - CHECKED
        attend_cached(router, cache, *(x[:, :, :place] for x in tokens))
        outs = []
        for length in lengths:
            new = [x[:, :, place : place + length] for x in tokens]
            outs.append(attend_cached(router, cache, *new, replay=way == "captured")[0])
            place += length
        got, want = torch.cat(outs, dim=2).float(), whole[:, :, -CHECKED:].float()
        others = float((~torch.isclose(got, want, rtol=2e-2, atol=1e-2)).any(-1).float().mean())
        print(f"  {way}: {others:.3%} of the outputs differ from those of one call", flush=True)
        if way == "captured":
            steps = captured_steps(cache.states)
            print(f"  {steps.captures} captures, {steps.replays} replays of {CHECKED} steps", flush=True)
        if not others <= (MOST_OTHER_ROWS if "lsh" in sources else 0.0) or not bool(got.isfinite().all()):
            raise RuntimeError(f"{way}: {others:.2%} of the outputs differ from those of one call")


def median_ms(step: Callable[[], object], *, ahead: bool = False) -> float:
    """``ahead``: the host's time is hidden behind work that the device has still to do."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(STEPS):
        for _ in range(3 if ahead else 1):
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not ahead:
            torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def replay_of(step: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def dense_times(length: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Name, milliseconds called, captured and on the device, of every kernel that serves the call."""
    _, k, v = random_tokens(length, 1)
    q = random_tokens(1, 3)[0]
    for kernel in KERNELS:

        def step(kernel: SDPBackend = kernel) -> object:
            return under_kernel(kernel, lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))

        try:
            for _ in range(3):
                step()
            replay = replay_of(step)
            found = {"called": median_ms(step), "captured": median_ms(replay), "device": median_ms(replay, ahead=True)}
            yield kernel.name.lower(), found
        except RuntimeError as error:
            print(f"  dense {kernel.name.lower()}: {str(error).splitlines()[0][:90]}", flush=True)


def measure(sources: Mapping[str, Mapping[str, Any]], length: int) -> dict[str, object]:
    router, cache = Router(config(sources)).cuda(), LayerCache()
    _, k, v = random_tokens(length, 1)
    cache.append(k, v)
    tokens = iter(zip(*(x.split(1, dim=2) for x in random_tokens(4096, 2)), strict=True))
    for _ in range(WARM_STEPS):
        attend_cached(router, cache, *next(tokens))
    new = next(tokens)
    out, graph = attend_cached(router, cache, *new)
    assert graph is not None
    wide = [x.float() for x in (new[0], cache.keys, cache.values)]
    exact, _ = neighbor_attention(*wide, graph, backend="torch")
    difference = float((out.float() - exact).abs().max() / exact.abs().max())
    del wide
    if not difference < 2e-2:
        raise RuntimeError(f"a step differs from the torch backend by {difference:.2g} of the largest output")
    found: dict[str, object] = {
        "largest_difference": f"{difference:.2g}",
        "keys_attended": f"{float((graph.degree() + graph.summaries_per_query()).float().mean()):.0f}",
        "called_ms": median_ms(lambda: attend_cached(router, cache, *next(tokens))),
        "replays": 0,
    }

    def step() -> object:
        return attend_cached(router, cache, *next(tokens), replay=True)

    for _ in range(WARM_STEPS):
        step()
    before = captured_steps(cache.states).replays
    found["captured_ms"] = median_ms(step)
    found["device_ms"] = median_ms(step, ahead=True)
    found["replays"] = captured_steps(cache.states).replays - before
    return found


def write(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def failures(mixes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """What `check` says of each mix that does not pass."""
    wrong: dict[str, str] = {}
    for mix, sources in mixes.items():
        print(f"checking {mix}", flush=True)
        try:
            check(sources)
        except Exception as error:  # noqa: BLE001  the other cases are worth measuring all the same
            traceback.print_exc()
            wrong[mix] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return wrong


def run(out: Path, mixes: Mapping[str, Mapping[str, Mapping[str, Any]]], lengths: Sequence[int]) -> None:
    """Measure all cases and write a CSV; a case that fails says why in its row."""
    wrong = failures(mixes)
    rows = []
    for length in sorted(lengths, reverse=True):
        dense = dict(dense_times(length))
        for name, times in dense.items():
            print(f"{length:>8} dense {name:20}", *(f"{kind} {ms:.3f}" for kind, ms in times.items()), "ms", flush=True)
        fastest = min(dense, key=lambda name: dense[name]["captured"])
        for mix, sources in mixes.items():
            row: dict[str, object] = dict.fromkeys(COLUMNS, "") | {
                "length": length, "mix": mix, "dense_kernel": fastest,
                **{f"dense_{kind}_ms": min(times[kind] for times in dense.values()) for kind in dense[fastest]},
                "device": torch.cuda.get_device_name(), "version": ssa_framework.__version__, "commit": commit(),
                "torch": torch.__version__, "message": wrong.get(mix, ""),
            }  # fmt: skip
            if mix not in wrong:
                try:
                    row |= measure(sources, length)
                    for kind in ("called", "captured", "device"):
                        ratio = float(str(row[f"dense_{kind}_ms"])) / float(str(row[f"{kind}_ms"]))
                        row[f"speedup_{kind}"] = f"{ratio:.2f}"
                except Exception as error:  # noqa: BLE001
                    traceback.print_exc()
                    row["message"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            for name in (name for name in COLUMNS if name.endswith("_ms") and row[name]):
                row[name] = f"{row[name]:.4f}"
            rows.append(row)
            write(out, rows)
            print("  ".join(f"{name}={row[name]}" for name in COLUMNS[:17]), flush=True)
