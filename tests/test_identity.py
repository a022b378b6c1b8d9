"""For any set of sources, sparse attention equals dense attention under the boolean mask of the graph."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense import dense_attention
from ssa_framework import SSAConfig, build_graph, sparse_attention

MIXES: dict[str, dict[str, dict[str, Any]]] = {
    "self": {"self": {}},
    "window": {"window": {"size": 5}},
    "global": {"global": {"tokens": 3}},
    "landmarks": {"global": {"indices": [0, 7, 500]}},
    "lsh": {"lsh": {"rounds": 3, "candidates": 6}},
    "lsh-probes": {"lsh": {"rounds": 2, "probes": 3, "candidates": 12}},
    "lsh-cross-polytope": {"lsh": {"rounds": 2, "probes": 2, "hash": "cross_polytope", "candidates": 12}},
    "clusters": {"clusters": {"levels": [[16, 4]], "keys": 8, "attend": "topk", "summaries": False}},
    "clusters-whole": {"clusters": {"levels": [[8, 2], [32, 4]], "keys": 8, "summaries": False}},
    "clusters-listed": {"random": {"links": 2}, "clusters": {"levels": [[16, 4]], "keys": 8, "summaries": False}},
    "blocks": {"self": {}, "blocks": {"size": 8, "keys": 16}},
    "topk": {"topk": {}},
    "random": {"self": {}, "random": {"links": 4}},
    "strided": {"self": {}, "strided": {"stride": 4, "count": 3}},
    "faiss": {"self": {}, "faiss": {"index": "Flat"}},
    "seed-mix": {"self": {}, "window": {"size": 3}, "global": {"tokens": 2}, "lsh": {"rounds": 4, "candidates": 8}},
    "everything": {
        "self": {},
        "window": {"size": 2},
        "global": {"indices": [4]},
        "random": {"links": 2},
        "strided": {"stride": 8, "count": 2},
        "lsh": {"rounds": 2, "candidates": 6},
        "topk": {},
    },
}
MASKS = ("none", "padding", "packed", "bool", "additive", "mask_mod")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def make_masks(kind: str, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    if kind == "padding":
        first = torch.arange(batch)[:, None] * (keys // 3)
        return {"key_padding_mask": torch.arange(keys)[None] >= first}
    if kind == "packed":
        return {"segment_ids": ((torch.arange(queries) // 19)[None], (torch.arange(keys) // 19)[None])}
    if kind == "bool":
        return {"attn_mask": torch.rand(batch, heads, queries, keys) > 0.3}
    if kind == "additive":
        return {"attn_mask": torch.randn(1, heads, queries, keys, dtype=dtype).requires_grad_()}
    if kind == "mask_mod":
        return {"mask_mod": lambda b, h, i, j: (i + 2 * j + h + b) % 3 != 0}
    return {}


def check_identity(
    mix: dict[str, dict[str, Any]],
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    queries: int = 63,
    keys: int = 63,
    causal: bool = False,
    graph_heads: str = "query",
    mask: str = "none",
    backend: str = "torch",
    graph_backend: str | None = None,
    budget: int = 16,
    dense_below: int | None = 0,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
) -> Tensor:
    """Compare forward and all gradients; return the boolean mask of the graph."""
    dim = 8
    q = torch.randn(batch, heads[0], queries, dim, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, heads[1], keys, dim, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, heads[1], keys, dim, dtype=dtype, requires_grad=True)
    config = SSAConfig(
        sources=mix, num_neighbors=budget, graph_heads=graph_heads, dense_below=dense_below, backend=backend
    )
    options = make_masks(mask, batch, heads[0], queries, keys, dtype)
    builder = config if graph_backend is None else replace(config, backend=graph_backend)
    graph = build_graph(q, k, config=builder, is_causal=causal, cross=False, **options)
    graph.validate()
    edges = graph.to_dense_mask()
    bias = options.get("attn_mask")
    bias = bias if mask == "additive" else None
    leaves = [q, k, v, *([bias] if bias is not None else [])]
    wanted = dense_attention(q, k, v, edges, bias)
    out = sparse_attention(q, k, v, config=config, graph=graph, enable_gqa=True)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(out, wanted, rtol=0, atol=tolerance)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    for got, want in zip(grads, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    return edges


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_every_mix(mix: dict[str, Any], heads: tuple[int, int], causal: bool) -> None:
    edges = check_identity(mix, heads=heads, causal=causal, budget=24)
    assert edges.any()


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask: str, causal: bool, graph_heads: str) -> None:
    check_identity(MIXES["everything"], mask=mask, causal=causal, graph_heads=graph_heads, budget=24)


@pytest.mark.parametrize("dense_below", [None, 10_000], ids=["default", "always-dense"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_dense_fallback(mask: str, causal: bool, dense_below: int | None) -> None:
    edges = check_identity(MIXES["seed-mix"], mask=mask, causal=causal, budget=64, dense_below=dense_below)
    allowed = torch.ones_like(edges)
    if causal:
        allowed = allowed.tril()
    options = make_masks(mask, 2, 4, 63, 63, torch.float64)
    if mask in ("none", "additive"):
        assert torch.equal(edges, allowed)
    elif mask == "padding":
        assert torch.equal(edges, allowed & options["key_padding_mask"][:, None, None])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (65, 1), (33, 65), (65, 33), (127, 127)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(queries: int, keys: int, causal: bool) -> None:
    check_identity(MIXES["everything"], queries=queries, keys=keys, causal=causal, budget=24)


@pytest.mark.parametrize("mask", MASKS)
def test_reference_backend(mask: str) -> None:
    check_identity(MIXES["seed-mix"], queries=21, keys=21, mask=mask, backend="reference", causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_numba_every_mix(mix: dict[str, Any], causal: bool) -> None:
    check_identity(mix, causal=causal, budget=24, backend="numba", graph_backend="torch")


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_numba_every_mask(mask: str, causal: bool, graph_heads: str) -> None:
    check_identity(
        MIXES["everything"],
        mask=mask,
        causal=causal,
        graph_heads=graph_heads,
        budget=24,
        backend="numba",
        graph_backend="torch",
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (65, 1), (33, 65), (65, 33)])
def test_numba_lengths(queries: int, keys: int) -> None:
    check_identity(MIXES["everything"], queries=queries, keys=keys, causal=True, backend="numba", graph_backend="torch")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix(data: st.DataObject) -> None:
    pool = {
        "self": {},
        "window": {"size": data.draw(st.integers(0, 9), label="window")},
        "global": {"indices": data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4), label="global")},
        "random": {"links": data.draw(st.integers(1, 3), label="links")},
        "strided": {"stride": data.draw(st.integers(1, 20), label="stride"), "count": 2},
        "lsh": {
            "rounds": data.draw(st.integers(1, 4), label="rounds"),
            "probes": data.draw(st.integers(0, 4), label="probes"),
            "hash": data.draw(st.sampled_from(["hyperplane", "cross_polytope"]), label="hash"),
            "candidates": data.draw(st.integers(1, 30), label="candidates"),
            "center": data.draw(st.booleans(), label="center"),
        },
        "topk": {},
    }
    names = data.draw(st.permutations(sorted(pool)), label="order")
    names = names[: data.draw(st.integers(1, len(names)), label="sources")]
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    length = data.draw(st.integers(1, 66), label="length")
    check_identity(
        {name: pool[name] for name in names},
        heads=data.draw(st.sampled_from(list(HEADS.values())), label="heads"),
        batch=data.draw(st.integers(1, 3), label="batch"),
        queries=length,
        keys=length,
        causal=data.draw(st.booleans(), label="causal"),
        graph_heads=data.draw(st.sampled_from(["query", "kv"]), label="graph_heads"),
        mask=data.draw(st.sampled_from(MASKS), label="mask"),
        backend=data.draw(st.sampled_from(["torch", "numba"]), label="backend"),
        graph_backend="torch",
        budget=data.draw(st.integers(40, 70), label="budget"),
    )


@pytest.mark.parametrize("length", [1, 63, 65, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_dtypes_within_the_error_of_dense(dtype: torch.dtype, length: int) -> None:
    """The error against float64 is at most that of dense attention computed in the same dtype."""
    q, k, v = (torch.randn(1, 2, length, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    config = SSAConfig(sources=MIXES["seed-mix"], num_neighbors=24, dense_below=0)
    graph = build_graph(q, k, config=config, is_causal=True)
    edges = graph.to_dense_mask()
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(1, 2, length, 16)

    def run(inputs: list[Tensor], sparse: bool) -> list[Tensor]:
        out = sparse_attention(*inputs, config=config, graph=graph) if sparse else dense_attention(*inputs, edges)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)]

    exact = run(exact_inputs, sparse=False)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, got, dense, want in zip(names, run([q, k, v], True), run([q, k, v], False), exact, strict=True):
        assert got.dtype == dtype
        error, bound = (got.double() - want).norm(), (dense.double() - want).norm()
        # one key: dense gradients are exactly zero, ours are the difference of two equal products, once rounded
        size = want.norm() if length > 1 else weight.norm() * exact[0].norm()
        floor = torch.finfo(dtype).eps * size
        assert error <= 1.5 * bound + floor, f"{name}: {error:.2e}, dense {bound:.2e}"
