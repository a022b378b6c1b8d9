"""`run_case`: one configuration of sparse attention against dense attention, checked first, then timed."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Measurement, Timer
from torch.utils.benchmark.utils.common import set_torch_threads

from ssa_framework.attention import build_graph, sparse_attention
from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError, SSAError
from ssa_framework.graph import NeighborGraph
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_backend
from ssa_framework.quality.exactness import output_difference
from ssa_framework.quality.measure import QualityReport, measure
from ssa_framework.quality.memory import peak_memory
from ssa_framework.quality.sample import pick_queries, sample_rows
from ssa_framework.quality.timing import Timing
from ssa_framework.router import Router

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
MODES = ("forward", "forward+backward")
LARGEST_DIFFERENCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-12}
"""Of an output that counts as right, relative to the largest value, where scores are small; see `score_rounding`."""
LARGEST_GRADIENT_DIFFERENCE = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5, "float64": 1e-12}
"""The same of gradients, relative to the largest element of each."""
MIN_ROUNDS, MAX_ROUNDS = 3, 50

_CHECKED_QUERIES = 64
_CHECK_ELEMENTS = 2**23  # scores of the exact computation, float64, stored several times


@dataclass(frozen=True)
class BenchCase:
    """What to measure.

    Attributes:
        mix: how the source mix is called in results.
        sources: the mix, or a whole configuration; the fields below take the place of what it says.
        backend: of the attention; see `SSAConfig`.
        length: N queries and as many keys.
        heads: query heads H. kv_heads: key/value heads, ``None`` = H.
        dtype: one of `DTYPES`. threads: torch's intra-op threads, for everything that is measured.
        mode: one of `MODES`.
        seed: of the data and of everything random in the sources.
        dense_below: see `SSAConfig`.
        captured: time replays of CUDA graphs, of the dense call too, so that the host's time does not count.
    """

    mix: str
    sources: Mapping[str, Mapping[str, Any]] | SSAConfig
    backend: str = "auto"
    length: int = 1024
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    num_neighbors: int = 128
    dtype: str = "float32"
    threads: int = 1
    causal: bool = False
    mode: str = "forward"
    batch: int = 1
    seed: int = 0
    dense_below: int | Literal["auto"] | None = None
    device: str = "cpu"
    captured: bool = False

    @property
    def config(self) -> SSAConfig:
        """Raises `ConfigError`."""
        base = self.sources if isinstance(self.sources, SSAConfig) else SSAConfig(sources=self.sources)
        return base.replace(
            d_model=self.heads * self.head_dim,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            num_neighbors=self.num_neighbors,
            causal=self.causal,
            backend=self.backend,
            seed=self.seed,
            dense_below=self.dense_below,
            rope_base=None,
        )

    def check(self) -> None:
        """Find mistakes before anything is measured.

        Raises:
            SSAError: a field out of range, an unknown source, option or backend.
        """
        for name, allowed in (("dtype", tuple(DTYPES)), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("length", "head_dim", "threads", "batch"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {number!r}")
        if self.captured and torch.device(self.device).type != "cuda":
            raise ConfigError(f"captured: only calls on a CUDA device are captured, got device {self.device!r}")
        check_backend(self.backend)
        Router(self.config)  # it resolves the sources and hands them their options


@dataclass(frozen=True)
class BenchRow:
    """What `run_case` found.

    Attributes:
        status: ``"ok"``; ``"failed"``: a wrong result, so no speed; ``"error"``: the case could not run.
        message: what went wrong.
        output_difference, gradient_difference: from dense attention under the graph's mask, computed in float64.
        computed_densely: the graph holds every allowed key.
        dense_kernel: on CUDA, which of torch's fused kernels dense attention takes: the fastest one for the case.
        dense, sparse: times of one call of dense attention, and of routing and attention together; with the
            gradients in mode ``forward+backward``. graph: of routing alone.
        dense_bytes, sparse_bytes: peak memory beyond the inputs.
        quality: of the graph, on a sample of the queries.
        environment: device, versions, commit and date.
    """

    case: BenchCase
    status: Literal["ok", "failed", "error"]
    message: str = ""
    output_difference: float | None = None
    gradient_difference: float | None = None
    computed_densely: bool | None = None
    dense_kernel: str = ""
    dense: Timing | None = None
    sparse: Timing | None = None
    graph: Timing | None = None
    dense_bytes: int | None = None
    sparse_bytes: int | None = None
    quality: QualityReport | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Dense time / sparse time, of the medians: above 1, sparse is faster."""
        return None if self.dense is None or self.sparse is None else self.dense.median / self.sparse.median

    @property
    def graph_share(self) -> float | None:
        """Time of routing / time of routing and attention."""
        return None if self.graph is None or self.sparse is None else self.graph.median / self.sparse.median

    @property
    def keys_scored(self) -> float | None:
        """Keys per query, of all sources together."""
        return None if self.quality is None else sum(self.quality.keys_scored.values())

    @property
    def slots_filled(self) -> float | None:
        """Neighbors per query, of all sources together."""
        return None if self.quality is None else sum(self.quality.slots.values())

    def to_dict(self) -> dict[str, str | float | int | bool | None]:
        """One row of a table: the same columns for every case, ``None`` where there is nothing to tell."""
        case, quality = self.case, self.quality
        row: dict[str, str | float | int | bool | None] = {
            "mix": case.mix,
            "backend": case.backend,
            "mode": case.mode,
            "causal": case.causal,
            "dtype": case.dtype,
            "threads": case.threads,
            "batch": case.batch,
            "length": case.length,
            "heads": case.heads,
            "kv_heads": case.heads if case.kv_heads is None else case.kv_heads,
            "head_dim": case.head_dim,
            "num_neighbors": case.num_neighbors,
            "dense_below": case.dense_below,
            "seed": case.seed,
            "captured": case.captured,
            "status": self.status,
            "message": self.message,
            "output_difference": _number(self.output_difference),
            "gradient_difference": _number(self.gradient_difference),
            "ratio": _number(self.ratio),
            "graph_share": _number(self.graph_share),
        }
        for name, timing in (("dense", self.dense), ("sparse", self.sparse), ("graph", self.graph)):
            lower, upper = (None, None) if timing is None else timing.quartiles
            row |= {
                f"{name}_ms": _number(None if timing is None else timing.median, 1e3),
                f"{name}_ms_lower_quartile": _number(lower, 1e3),
                f"{name}_ms_upper_quartile": _number(upper, 1e3),
                f"{name}_readings": None if timing is None else len(timing.readings),
            }
        return row | {
            "dense_peak_mib": _number(self.dense_bytes, 2**-20),
            "sparse_peak_mib": _number(self.sparse_bytes, 2**-20),
            "computed_densely": self.computed_densely,
            "dense_kernel": self.dense_kernel,
            "keys_scored": _number(self.keys_scored),
            "slots_filled": _number(self.slots_filled),
            "keys_scored_by_source": None if quality is None else _json(quality.keys_scored),
            "slots_by_source": None if quality is None else _json(quality.slots),
            "recall_at": None if quality is None else quality.recall_at,
            "recall": _number(None if quality is None else quality.recall),
            "attention_mass": _number(None if quality is None else quality.attention_mass),
            "output_error": _number(None if quality is None else quality.output_error_total),
            "queries_measured": None if quality is None else quality.queries,
            "sources": json.dumps(case.config.source_mix, default=repr),
            **self.environment,
        }


def _number(value: float | None, unit: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * unit:.6g}")


def _json(per_source: Mapping[str, float]) -> str:
    return json.dumps({name: _number(value) for name, value in per_source.items()})


def run_case(
    case: BenchCase,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    min_seconds: float = 1.0,
    sample: int = 128,
    recall_at: int = 32,
    on_stage: Callable[[str], object] | None = None,
) -> BenchRow:
    """Check one case, then time it against `F.scaled_dot_product_attention`, then say what its graph is worth.

    Dense and sparse calls alternate in this process, on the same tensors and threads. A case whose output, or
    gradients in mode ``forward+backward``, are not those of dense attention under the graph's mask gets no speed.
    Both are looked at for a sample of the queries.

    Args:
        tensors: ``q [B, H, N, D]`` and ``k, v [B, Hkv, N, D]`` of the case's sizes; Gaussian noise if left out.
        min_seconds: time for readings of a case, at least `MIN_ROUNDS` rounds and at most `MAX_ROUNDS` all the same.
        sample, recall_at: see `measure`.
        on_stage: told what comes next: ``"check"``, ``"time"``, ``"memory"``, ``"quality"``.

    Raises:
        ConfigError: ``tensors`` that are not of the case's sizes. What goes wrong in the case itself is in the row.
    """
    if tensors is not None and [x.shape for x in tensors] != _shapes(case):
        raise ConfigError(f"tensors must have the shapes {_shapes(case)}, got {[tuple(x.shape) for x in tensors]}")
    stage = on_stage if on_stage is not None else lambda _: None
    try:
        case.check()
        with set_torch_threads(case.threads):
            return _run(case, tensors, min_seconds, sample, recall_at, stage)
    except (SSAError, RuntimeError, MemoryError) as error:
        message = f"{type(error).__name__}: {error}"
        return BenchRow(case, "error", message, environment=environment(case.device))


def _run(
    case: BenchCase,
    tensors: tuple[Tensor, Tensor, Tensor] | None,
    min_seconds: float,
    sample: int,
    recall_at: int,
    stage: Callable[[str], object],
) -> BenchRow:
    stage("check")
    calls = _Calls(case, tensors)
    graph = calls.build()
    checks = _check(case, calls, graph)
    found: dict[str, Any] = {
        **{name: difference for name, difference, _ in checks},
        "computed_densely": graph.is_full,
        "dense_kernel": "" if calls.dense_kernel is None else calls.dense_kernel.name.lower(),
        "environment": environment(case.device),
    }
    wrong = [f"{name} {got:.2g}, accepted {bound:.2g}" for name, got, bound in checks if not got <= bound]
    if wrong:
        message = "not dense attention under the graph's mask: " + "; ".join(wrong).replace("_", " ")
        return BenchRow(case, "failed", message, **found)
    stage("time")
    contestants = {"dense": calls.dense, "sparse": calls.sparse, "graph": calls.build}
    if case.captured:
        contestants = {name: _replay_of(call) for name, call in contestants.items()}
    found |= _time(contestants, case.threads, min_seconds)
    stage("memory")
    found |= {
        "dense_bytes": peak_memory(calls.dense, case.device),
        "sparse_bytes": peak_memory(calls.sparse, case.device),
    }
    stage("quality")
    report = measure(calls.q, calls.k, calls.v, graph, recall_at=recall_at, sample=sample, seed=case.seed)
    return BenchRow(case, "ok", quality=report, **found)


def _shapes(case: BenchCase) -> list[tuple[int, int, int, int]]:
    """Of q, k and v."""
    kv_heads = case.heads if case.kv_heads is None else case.kv_heads
    return [(case.batch, heads, case.length, case.head_dim) for heads in (case.heads, kv_heads, kv_heads)]


class _Calls:
    """The calls that are compared, on the tensors of one case."""

    def __init__(self, case: BenchCase, tensors: tuple[Tensor, Tensor, Tensor] | None) -> None:
        shapes = _shapes(case)
        device, dtype = torch.device(case.device), DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(case.seed)
        if tensors is None:  # in the dtype: at a million tokens, float32 would not fit beside it
            made = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
        q, k, v = made if tensors is None else tensors
        self.config = case.config
        self.causal = case.causal
        self.backward = case.mode == "forward+backward"
        self.q, self.k, self.v = (x.detach().to(device, dtype).requires_grad_(self.backward) for x in (q, k, v))
        self.upstream = torch.randn(shapes[0], generator=generator, device=device, dtype=dtype)
        self.dense_kernel = _fastest_kernel(self._dense, device)

    def build(self) -> NeighborGraph:
        return build_graph(self.q, self.k, config=self.config)

    def attend(self, graph: NeighborGraph) -> Tensor:
        return sparse_attention(self.q, self.k, self.v, config=self.config, graph=graph, enable_gqa=True)

    def sparse(self) -> object:
        return self._with_gradients(self.attend(self.build()))

    def dense(self) -> object:
        return under_kernel(self.dense_kernel, self._dense)

    def _dense(self) -> object:
        grouped = self.q.shape[1] != self.k.shape[1]
        out = F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=self.causal, enable_gqa=grouped)
        return self._with_gradients(out)

    def _with_gradients(self, out: Tensor) -> object:
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.upstream) if self.backward else out


_CUDA_KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_SLOWER_CUDA_KERNELS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # for what those do not serve, as float32


def under_kernel(kernel: SDPBackend | None, call: Callable[[], object]) -> object:
    """``call()`` with one of torch's kernels for dense attention; with torch's choice for ``None``."""
    if kernel is None:
        return call()
    with sdpa_kernel(kernel):
        return call()


def _fastest_kernel(call: Callable[[], object], device: torch.device) -> SDPBackend | None:
    """Which of torch's fused CUDA kernels is the fastest for a call of dense attention; torch's choice elsewhere."""
    if device.type != "cuda":
        return None
    for kernels in (_CUDA_KERNELS, _SLOWER_CUDA_KERNELS):
        times = {}
        for kernel in kernels:
            with contextlib.suppress(RuntimeError), warnings.catch_warnings():  # it does not serve the call
                warnings.simplefilter("ignore")
                timer = Timer("run()", globals={"run": functools.partial(under_kernel, kernel, call)})
                times[kernel] = timer.timeit(1).median
        if times:
            return min(times, key=times.__getitem__)
    return None


# -- correctness -----------------------------------------------------------------------------------------------------


def _check(case: BenchCase, calls: _Calls, graph: NeighborGraph) -> list[tuple[str, float, float]]:
    """Name, difference and bound of everything that must be right."""
    scores_per_query = case.batch * case.heads * case.length
    sample = max(1, min(_CHECKED_QUERIES, _CHECK_ELEMENTS // scores_per_query))
    out = calls.attend(graph)
    inputs = calls.q, calls.k, calls.v
    difference = output_difference(*inputs, graph, out.detach(), sample=sample, seed=case.seed)
    rounding = score_rounding(calls.q, calls.k)
    checks = [("output_difference", difference, LARGEST_DIFFERENCE[case.dtype] + rounding)]
    if calls.backward:
        difference = _gradient_difference(calls, out, graph, sample, case.seed)
        checks.append(("gradient_difference", difference, LARGEST_GRADIENT_DIFFERENCE[case.dtype] + rounding))
    return checks


@torch.no_grad()
def score_rounding(query: Tensor, key: Tensor) -> float:
    """Relative error of a weight that comes from rounding its score, at most: it grows with the score."""
    largest = float(query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()) * query.shape[-1] ** -0.5
    return largest * torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).eps


def _gradient_difference(calls: _Calls, out: Tensor, graph: NeighborGraph, sample: int, seed: int) -> float:
    """How far the gradients of a sample of the queries are from those of the ``reference`` backend in float64.

    Nothing flows into the other queries, so the gradients of keys and values are exact too. Relative to the largest
    element of each gradient, or to a tenth of the largest of all, where that is more: the gradient of a query with
    a single neighbor is zero.
    """
    rows = sample_rows(graph.num_queries, sample, seed, out.device)
    upstream = torch.zeros_like(out)
    upstream[:, :, rows] = calls.upstream[:, :, rows]
    got = torch.autograd.grad(out, (calls.q, calls.k, calls.v), upstream)
    q, k, v = (x.detach().double().requires_grad_() for x in (calls.q[:, :, rows], calls.k, calls.v))
    exact_out, _ = neighbor_attention(q, k, v, pick_queries(graph, rows), backend="reference")
    exact = list(torch.autograd.grad(exact_out, (q, k, v), upstream[:, :, rows].double()))
    exact[0] = torch.zeros_like(calls.q, dtype=torch.float64).index_copy(2, rows, exact[0])
    sizes = [float(x.abs().max()) for x in exact]
    worst = 0.0
    for g, e, size in zip(got, exact, sizes, strict=True):
        difference = float((g.double() - e).abs().max())
        if not isfinite(difference):
            return inf
        worst = max(worst, difference / (max(size, max(sizes) / 10) or 1.0))
    return worst


# -- cost ------------------------------------------------------------------------------------------------------------


def _replay_of(call: Callable[[], object]) -> Callable[[], object]:
    """Replays what the call does on the GPU, see `torch.cuda.CUDAGraph`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _time(contestants: Mapping[str, Callable[[], object]], threads: int, seconds: float) -> dict[str, Timing]:
    """Readings in turn, round after round, so that drift of the machine hits all contestants.

    A `Timer` calls what it times once or more before its first reading, so that set-up and a cold cache don't count.
    """
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in contestants.items()}
    measured: dict[str, list[Measurement]] = {name: [] for name in timers}
    block = seconds / (len(timers) * 4 * MIN_ROUNDS)
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start >= seconds:
            break
        for name, timer in timers.items():
            measured[name].append(timer.blocked_autorange(min_run_time=block))
    return {name: Timing(tuple(Measurement.merge(readings)[0].times)) for name, readings in measured.items()}


# -- where and when --------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    """Device, versions, commit and the time of day (UTC)."""
    return {**_fixed_environment(device), "date": datetime.now(UTC).isoformat(timespec="seconds")}


@functools.cache
def _fixed_environment(device: str) -> dict[str, str]:
    has_name = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if has_name else device,
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "version": _version("ssa-framework"),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """Short hash of the checkout that this file is in, marked where it has uncommitted changes."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:  # installed, perhaps into somebody else's checkout
        return "unknown"
    return _git(root, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip()


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """One line per case, under the names of `BenchRow.to_dict`; what is missing stays empty.

    Raises:
        OSError: the file cannot be written.
    """
    table = [row.to_dict() for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)
