"""The CPU kernels of the attention op: odd sizes, threads, processes, the kernel cache."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dense import dense_attention
from ssa_framework import NeighborGraph, SSAConfig, build_graph
from ssa_framework.errors import BackendUnavailableError
from ssa_framework.ops.neighbor_attention import api, neighbor_attention, numba_cpu, torch_gather
from ssa_framework.ops.neighbor_attention.parts import GraphParts

MIX = {"self": {}, "window": {"size": 3}, "global": {"indices": [0, 5]}, "random": {"links": 7}}
FORKING = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(
    length: int = 65,
    dim: int = 16,
    value_dim: int | None = None,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = [(heads[0], dim), (heads[1], dim), (heads[1], value_dim or dim)]
    return [torch.randn(2, h, length, d, dtype=dtype, requires_grad=True) for h, d in shapes]


def graph_of(q: Tensor, k: Tensor, causal: bool = True, graph_heads: str = "query") -> NeighborGraph:
    config = SSAConfig(sources=MIX, num_neighbors=16, graph_heads=graph_heads)
    return build_graph(q, k, config=config, is_causal=causal)


def run(inputs: list[Tensor], graph: NeighborGraph, **options: object) -> list[Tensor]:
    out, lse = neighbor_attention(*inputs, graph, backend="numba", **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, lse, *torch.autograd.grad((out * weight).sum() + lse.square().sum(), inputs)]


def assert_close_to_dense(inputs: list[Tensor], graph: NeighborGraph, tolerance: float) -> None:
    got = run(inputs, graph)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, _ = exact
    edges = graph.to_dense_mask()
    out = dense_attention(*exact, edges)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~edges, -torch.inf).logsumexp(-1)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    want = [out, lse, *torch.autograd.grad((out * weight).sum() + lse.square().sum(), exact)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("length", [1, 63, 65, 1023])
def test_odd_lengths(length: int, graph_heads: str, dtype: torch.dtype) -> None:
    inputs = tensors(length, dtype=dtype)
    graph = graph_of(*inputs[:2], graph_heads=graph_heads)
    assert_close_to_dense(inputs, graph, 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("dim", [1, 3, 16, 64, 80, 128])
@pytest.mark.parametrize("value_dim", [None, 5], ids=["same", "five"])
def test_widths(dim: int, value_dim: int | None, dtype: torch.dtype) -> None:
    inputs = tensors(dim=dim, value_dim=value_dim, dtype=dtype)
    assert_close_to_dense(inputs, graph_of(*inputs[:2]), 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("fp32_weights", [False, True])
def test_half_precision_is_as_accurate_as_torch(dtype: torch.dtype, fp32_weights: bool) -> None:
    q, k, v = (x.detach() for x in tensors(257, dtype=dtype))
    graph = graph_of(q, k)
    exact = dense_attention(q.double(), k.double(), v.double(), graph.to_dense_mask())

    def error(backend: str) -> float:
        out, _ = neighbor_attention(q, k, v, graph, fp32_weights=fp32_weights, backend=backend)
        assert out.dtype == dtype
        return float((out.double() - exact).norm())

    assert error("numba") <= error("torch") * 1.001


@pytest.mark.parametrize("bias_shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("list_shape", [(1, 1), (1, 2), (2, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_parts_equal_the_torch_implementation(
    causal: bool, list_shape: tuple[int, int], bias_shape: tuple[int, int]
) -> None:
    """Everything at once: offset, columns, padding, documents, broadcast lists and biases, empty slots and rows."""
    queries, keys, slots = 33, 41, 7
    q = torch.randn(2, 4, queries, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, 6, dtype=torch.float64), torch.randn(2, 2, keys, 3, dtype=torch.float64)
    columns = torch.tensor([0, 9, 30], dtype=torch.int32)
    neighbors = torch.rand(*list_shape, queries, keys).argsort(-1)[..., :slots].int()
    positions = torch.arange(queries)[:, None] + 4
    covered = ((neighbors >= positions - 3) & (neighbors <= positions + 2)) | torch.isin(neighbors, columns)
    late = (neighbors > positions) if causal else torch.zeros_like(covered)
    neighbors = neighbors.masked_fill(covered | late, -1)
    neighbors[..., 11, :] = -1
    bias = torch.randn(*bias_shape, queries, slots, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    parts = GraphParts(
        band_before=3,
        band_after=2,
        query_offset=4,
        causal=causal,
        columns=columns,
        neighbors=neighbors,
        bias=bias,
        key_keep=torch.rand(2, keys) > 0.3,
        query_segments=torch.arange(queries)[None] // 9,
        key_segments=torch.arange(keys)[None] // 9,
    )
    options = {"scale": 0.4, "dropout_p": 0.0, "seed": 0}
    out, lse = numba_cpu.forward(q, k, v, parts, fp32_weights=False, **options)
    wanted = torch_gather.forward(q, k, v, parts, fp32_weights=False, **options)
    for a, b in zip((out, lse), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, parts)
    got, want = numba_cpu.backward(*arguments, **options), torch_gather.backward(*arguments, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_wide_band_and_key_with_many_queries() -> None:
    q, k, v = tensors(700, heads=(2, 1))
    config = SSAConfig(sources={"window": {"size": 150}, "global": {"indices": [3]}}, num_neighbors=302)
    assert_close_to_dense([q, k, v], build_graph(q, k, config=config), 3e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None], dropout_p: float) -> None:
    inputs = tensors(500)
    graph = graph_of(*inputs[:2])
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        torch.manual_seed(1)
        results.append(run(inputs, graph, dropout_p=dropout_p))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_keeps_the_right_share() -> None:
    q, k, v = (x.detach() for x in tensors(400, heads=(1, 1)))
    v = torch.ones_like(v)
    graph = graph_of(q, k)
    out, _ = neighbor_attention(torch.zeros_like(q), k, v, graph, dropout_p=0.25, backend="numba")
    assert abs(float(out.mean()) - 1.0) < 0.02
    again, _ = neighbor_attention(torch.zeros_like(q), k, v, graph, dropout_p=0.25, backend="numba")
    assert not torch.equal(out, again)


def test_several_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    cases = []
    for seed in range(6):
        torch.manual_seed(seed)
        inputs = tensors(300)
        cases.append((inputs, graph_of(*inputs[:2])))
    want = [run(*case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda case: run(*case), cases * 4))
    for index, results in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(results, want[index % 6], strict=True))


@FORKING
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_the_same(threads: Callable[[int], None]) -> None:
    q, k, v = (x.detach() for x in tensors(300, dim=4))
    graph = graph_of(q, k)
    threads(3)
    want, _ = neighbor_attention(q, k, v, graph, backend="numba")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            got, _ = neighbor_attention(q, k, v, graph, backend="numba")
            status = 0 if np.array_equal(got.numpy(), want.numpy()) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


WORKER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from ssa_framework import NeighborGraph
from ssa_framework.ops.neighbor_attention import neighbor_attention

class Attended(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        q, k, v = torch.randn(3, 1, 2, 200, 4, generator=torch.Generator().manual_seed(index))
        lists = (torch.arange(200)[:, None] * 7 + torch.tensor([0, 31, 62])) % 200
        graph = NeighborGraph.from_lists(lists[None, None], num_keys=200, batch=1, num_heads=2)
        return neighbor_attention(q, k, v, graph, backend="numba")[0]

if __name__ == "__main__":
    want = torch.stack([Attended()[i] for i in range(4)])
    loader = DataLoader(Attended(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1], timeout=120)
    assert torch.equal(torch.cat(list(loader)), want)
    print("same")
"""


def python(tmp_path: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "plugins")])
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(tmp_path: Path, context: str) -> None:
    assert python(tmp_path, WORKER, context).stdout.strip() == "same"


def test_strided_and_expanded_inputs() -> None:
    base = torch.randn(2, 65, 4, 24, dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in base.split(8, dim=-1))
    k = k[:, :1].expand(-1, 4, -1, -1)
    lists = torch.randint(0, 65, (65, 130), dtype=torch.int32)[:, ::13].sort(-1)[0]
    lists[:, 1:][lists[:, 1:] == lists[:, :-1]] = -1
    graph = NeighborGraph.from_lists(lists.expand(2, 4, -1, -1), num_keys=65, batch=2, num_heads=4)
    got, want = ([*neighbor_attention(*x, graph, backend=b)] for x, b in (((q, k, v), "numba"), ((q, k, v), "torch")))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_key_that_is_not_attended_is_not_read() -> None:
    q, k, v = (x.detach() for x in tensors(40))
    lists = torch.randint(1, 39, (40, 1), dtype=torch.int32)
    graph = NeighborGraph.from_lists(lists[None, None], num_keys=40, batch=2, num_heads=4)
    k[:, :, [0, 39]], v[:, :, [0, 39]] = torch.nan, torch.inf
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for x in run(inputs, graph):
        assert bool(x.isfinite().all())


def test_other_devices_are_refused() -> None:
    q = torch.empty(1, 1, 1, 1, device="meta")
    with pytest.raises(BackendUnavailableError, match=r"'numba' computes on the CPU, the tensors are on meta"):
        api._choose_backend("numba", q)
    assert api._choose_backend("auto", q) == "torch"
    assert api._choose_backend("auto", torch.empty_like(q, device="cpu")) == "numba"


SMALL_CALL = """
import sys
import torch
from ssa_framework import NeighborGraph
from ssa_framework.ops.neighbor_attention import neighbor_attention

assert "numba" not in sys.modules
q, k, v = torch.randn(3, 1, 2, 20, 4, requires_grad=True)
graph = NeighborGraph.from_lists(torch.arange(20).view(1, 1, 20, 1), num_keys=20, batch=1, num_heads=2)
{before}
for _ in range(2):
    out, _ = neighbor_attention(q, k, v, graph, backend="numba")
    {after}
print("done")
"""


def test_compilation_is_announced_once_and_cached(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    code = SMALL_CALL.format(before="", after="out.sum().backward()")
    cold = python(tmp_path, code, NUMBA_CACHE_DIR=cache)
    assert cold.stderr.count("compiling CPU kernels") == 1
    assert "attend_rows" in cold.stderr
    warm = python(tmp_path, code, NUMBA_CACHE_DIR=cache)
    assert warm.stderr == ""
    assert warm.stdout.strip() == "done"


def test_an_unwritable_cache_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # a path below a file can't be made, not even by root
    # ... and no other place: neither beside the sources nor in the home of the user
    only = "from numba.core import caching as c; c.CacheImpl._locator_classes = [c.UserProvidedCacheLocator]"
    result = python(
        tmp_path, SMALL_CALL.format(before=only, after=""), NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache")
    )
    assert result.stdout.strip() == "done"
    assert result.stderr.count("RuntimeWarning: CPU kernels cannot be cached") == 1
