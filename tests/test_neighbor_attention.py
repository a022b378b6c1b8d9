"""The attention op: what does not depend on routing."""

import math

import pytest
import torch

from dense import dense_attention
from ssa_framework import NeighborGraph, SSAConfig, build_graph, sparse_attention
from ssa_framework.errors import BackendUnavailableError, ConfigError, DtypeError, GraphError, ShapeError
from ssa_framework.ops.neighbor_attention import available_backends, neighbor_attention, torch_gather
from ssa_framework.ops.neighbor_attention.api import _parts_in_rows
from ssa_framework.ops.neighbor_attention.op import neighbor_attention_op

MIX = {"self": {}, "window": {"size": 3}, "global": {"indices": [0, 5]}, "topk": {}}
BACKENDS = [name for name in available_backends() if name != "auto"]


def tensors(length: int = 65, dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2):
    return [torch.randn(2, h, length, 8, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def graph_of(q: torch.Tensor, k: torch.Tensor, causal: bool = True, **options: object) -> NeighborGraph:
    return build_graph(q, k, config=SSAConfig(sources=MIX, num_neighbors=16, **options), is_causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
def test_lse_and_its_gradient(backend: str, graph_heads: str) -> None:
    q, k, v = tensors()
    graph = graph_of(q, k, graph_heads=graph_heads)
    out, lse = neighbor_attention(q, k, v, graph, backend=backend)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / math.sqrt(8)
    want = scores.masked_fill(~graph.to_dense_mask(), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, want, rtol=0, atol=1e-10)
    weight = torch.randn_like(lse)
    got = torch.autograd.grad((lse * weight).sum() + out.sum(), [q, k])
    dense = dense_attention(q, k, v, graph.to_dense_mask())
    wanted = torch.autograd.grad((want * weight).sum() + dense.sum(), [q, k])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_without_neighbors_gets_zeros(backend: str) -> None:
    q, k, v = tensors(4)
    neighbors = torch.tensor([[[[0, 1], [-1, -1], [2, -1], [-1, -1]]]])
    graph = NeighborGraph.from_lists(neighbors, num_keys=4, batch=2, num_heads=4)
    out, lse = neighbor_attention(q, k, v, graph, backend=backend)
    assert bool((out[:, :, [1, 3]] == 0).all())
    assert bool((lse[:, :, [1, 3]] == -math.inf).all())
    for grad in torch.autograd.grad(out.sum() + lse[:, :, [0, 2]].sum(), [q, k, v]):
        assert bool(grad.isfinite().all())


def test_values_of_another_width() -> None:
    q, k, _ = tensors()
    v = torch.randn(2, 2, 65, 3, dtype=torch.float64, requires_grad=True)
    graph = graph_of(q, k)
    got, want = sparse_attention(q, k, v, graph=graph, enable_gqa=True), dense_attention(q, k, v, graph.to_dense_mask())
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), [q, k, v]), torch.autograd.grad(want.sum(), [q, k, v]), strict=True):
        torch.testing.assert_close(a, b)


def test_scale() -> None:
    q, k, v = tensors()
    graph = graph_of(q, k)
    want = dense_attention(q, k, v, graph.to_dense_mask(), scale=0.7)
    torch.testing.assert_close(sparse_attention(q, k, v, scale=0.7, graph=graph, enable_gqa=True), want)


def test_strided_and_expanded_inputs() -> None:
    base = torch.randn(2, 65, 4, 24, dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in base.split(8, dim=-1))
    k = k[:, :1].expand(-1, 4, -1, -1)
    graph = graph_of(q, k)
    got = sparse_attention(q, k, v, graph=graph)
    want = sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), graph=graph)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
def test_small_chunks_equal_one(monkeypatch: pytest.MonkeyPatch, graph_heads: str) -> None:
    q, k, v = tensors()
    graph = graph_of(q, k, graph_heads=graph_heads)

    def run() -> list[torch.Tensor]:
        out, _ = neighbor_attention(q, k, v, graph, backend="torch")
        return [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]

    whole = run()
    monkeypatch.setattr(torch_gather, "WORK_BYTES", 30_000)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
class TestDropout:
    def test_is_unbiased_and_zero_probability_is_exact(self, backend: str) -> None:
        q, k, v = (x.detach() for x in tensors(33))
        graph = graph_of(q, k)
        want, _ = neighbor_attention(q, k, v, graph, backend=backend)
        drawn = torch.stack([neighbor_attention(q, k, v, graph, dropout_p=0.3, backend=backend)[0] for _ in range(600)])
        error = (drawn.mean(0) - want).abs() / (drawn.std(0) / math.sqrt(600) + 1e-12)
        assert float(error.mean()) < 1.2  # the mean of |N(0, 1)| is 0.8
        assert not torch.equal(drawn[0], drawn[1])

    @pytest.mark.parametrize("work", [32 * 2**20, 30_000], ids=["one-chunk", "many-chunks"])
    def test_backward_drops_the_same_weights(self, monkeypatch: pytest.MonkeyPatch, work: int, backend: str) -> None:
        monkeypatch.setattr(torch_gather, "WORK_BYTES", work)
        q, k, v = tensors(17)
        graph = graph_of(q, k)

        def attend(*inputs: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(5)
            return neighbor_attention(*inputs, graph, dropout_p=0.4, backend=backend)[0]

        assert torch.autograd.gradcheck(attend, (q, k, v), atol=1e-6, nondet_tol=0.0, fast_mode=True)

    def test_probability_is_checked(self, backend: str) -> None:
        q, k, v = tensors(5)
        with pytest.raises(ConfigError, match="dropout_p"):
            neighbor_attention(q, k, v, graph_of(q, k), dropout_p=1.0, backend=backend)


def test_fp32_weights_are_closer_to_exact() -> None:
    q, k, v = (x.detach() for x in tensors(512, torch.bfloat16))
    graph = graph_of(q, k)
    exact = dense_attention(q.double(), k.double(), v.double(), graph.to_dense_mask())

    def error(fp32: bool) -> float:
        out, _ = neighbor_attention(q, k, v, graph, fp32_weights=fp32, backend="torch")
        return float((out.double() - exact).norm())

    assert error(True) < error(False)


def test_autocast_computes_in_half_precision() -> None:
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_attention(q, k, v, config=SSAConfig(sources=MIX, num_neighbors=16))
    assert out.dtype == torch.bfloat16


def test_gradients_reach_an_additive_mask_only_on_edges() -> None:
    q, k, v = tensors(33)
    mask = torch.zeros(33, 33, dtype=torch.float64, requires_grad=True)
    graph = build_graph(q, k, config=SSAConfig(sources=MIX, num_neighbors=16), attn_mask=mask)
    sparse_attention(q, k, v, graph=graph, enable_gqa=True).square().sum().backward()
    edges = graph.to_dense_mask().any(0).any(0)
    assert bool((mask.grad[~edges] == 0).all())
    assert float(mask.grad.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 4, 0, 8)], ids=["no-batch", "no-queries"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_inputs(shape: tuple[int, ...], backend: str) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 4, 5, 8)
    out = sparse_attention(q, k, k, config=SSAConfig(sources=MIX, num_neighbors=16, backend=backend))
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_no_keys_gives_zeros(backend: str) -> None:
    q, k = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 4, 0, 8)
    out = sparse_attention(q, k, k, config=SSAConfig(sources=MIX, num_neighbors=16, backend=backend))
    assert torch.equal(out, torch.zeros(2, 4, 5, 8))
    out.sum().backward()
    assert bool((q.grad == 0).all())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_the_op_is_a_proper_torch_op(backend: str) -> None:
    q, k, v = tensors(20)
    mixes = {"lists": None, "summaries": {"global": {"indices": [0]}, "clusters": {"levels": [[4, 2], [8, 2]]}}}
    for name, mix in mixes.items():
        graph = graph_of(q, k) if mix is None else build_graph(q, k, config=SSAConfig(sources=mix, num_neighbors=4))
        ((_, parts),) = _parts_in_rows(graph, k, v)
        assert (parts.neighbors is not None) == (name == "lists")
        assert (parts.summary_k is not None) == (name == "summaries")
        made = [None if x is None else x.detach().requires_grad_() for x in (parts.summary_k, parts.summary_v)]
        arguments = (
            q, k, v, parts.bias, *made, *parts.structure,
            [parts.band_before, parts.band_after], 0, True, 0.35, 0.0, 0, False, backend,
        )  # fmt: skip
        results = torch.library.opcheck(neighbor_attention_op, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ShapeError, r"\[batch, heads, length, head_dim\]"),
        (lambda q, k, v: (q, k[..., :4], v), ShapeError, "head_dim"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ShapeError, "key and value"),
        (lambda q, k, v: (q[:, :3], k, v), ShapeError, "multiple of key/value heads"),
        (lambda q, k, v: (q[:1], k, v), ShapeError, "batch sizes differ"),
        (lambda q, k, v: (q.float(), k, v), DtypeError, "share a dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), DtypeError, "float16, bfloat16"),
        (lambda q, k, v: (None, k, v), DtypeError, "must be a tensor"),
    ],
    ids=["rank", "head-dim", "length", "heads", "batch", "dtypes", "integers", "none"],
)
def test_inputs_are_checked(change, error: type[Exception], message: str) -> None:
    q, k, v = tensors(9)
    graph = graph_of(q, k)
    with pytest.raises(error, match=message):
        neighbor_attention(*change(q, k, v), graph)


def test_a_graph_of_other_shapes_is_refused() -> None:
    q, k, v = tensors(9)
    graph = graph_of(q, k)
    with pytest.raises(GraphError, match="num_queries = 9, tensors have 8"):
        neighbor_attention(q[:, :, :8], k, v, graph)


def test_named_backends_serve_or_raise() -> None:
    q, k, v = tensors(9)
    graph = graph_of(q, k)
    with pytest.raises(BackendUnavailableError, match=r"'cuda-magic' is not available; available: .*torch"):
        neighbor_attention(q, k, v, graph, backend="cuda-magic")
    big = torch.randn(1, 1, 16_384, 4)
    graph = build_graph(big, big, config=SSAConfig(sources={"self": {}}))
    with pytest.raises(BackendUnavailableError, match="use backend='torch'"):
        neighbor_attention(big, big, big, graph, backend="reference")
