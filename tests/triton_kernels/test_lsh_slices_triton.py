"""The Triton kernels that hash and order, in the interpreter, against torch on inputs whose projections are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.lsh_slices import HashLevels, lsh_slices, triton_cuda
from ssa_framework.source import LayerSpec, RoutingContext
from ssa_plugins.lsh import LSH
from test_lsh_slices import members, whole_numbers

FAMILIES = ["hyperplane", "cross_polytope"]


def levels_of(
    queries: int,
    keys: int,
    *,
    causal: bool,
    dim: int = 16,
    batch: int = 1,
    padding: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    **options: object,
) -> tuple[LSH, HashLevels]:
    """What the ``lsh`` source asks for."""
    layer = LayerSpec(head_dim=dim, num_heads=4, num_kv_heads=2, graph_heads=4, num_neighbors=24)
    source = LSH(layer, candidates=12, **options)
    q, k = torch.zeros(batch, 4, queries, dim), torch.zeros(batch, 2, keys, dim)
    mask = make_edge_mask(
        batch=batch,
        heads=4,
        queries=queries,
        keys=keys,
        device=q.device,
        causal=causal,
        query_positions=torch.arange(queries) + (keys - queries if causal else 0),
        key_padding_mask=padding,
        segment_ids=ids,
    )
    context = RoutingContext(q=q, shared_k=k, mask=mask, budget=8)
    return source, source._levels(context)


def both(
    source: LSH, levels: HashLevels, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> None:
    """``shape``: batch, queries, keys, head dim."""
    batch, queries, keys, dim = shape
    q, k = whole_numbers(batch, 4, queries, dim).to(dtype), whole_numbers(batch, 2, keys, dim, seed=1).to(dtype)
    planes = whole_numbers(*source.planes.shape, seed=2, high=9)
    got, want = (
        lsh_slices(q, k, planes, levels, family=source.hash, probes=source.probes, center=False, backend=backend)
        for backend in ("triton", "torch")
    )
    assert members(*got) == members(*want)
    assert got[0].shape[-1] <= levels.longest
    assert got[0].amin() >= 0
    assert got[0].amax() < keys
    for x in got:
        assert x.dtype == torch.int32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("probes", [0, 1, 5])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(1, 150, True), (65, 140, False), (141, 141, True)], ids=["one", "full", "causal"]
)
def test_same_slices_as_torch(family: str, probes: int, queries: int, keys: int, causal: bool) -> None:
    source, levels = levels_of(queries, keys, causal=causal, hash=family, probes=probes, rounds=2)
    both(source, levels, (1, queries, keys, 16))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_documents_and_padding(family: str, causal: bool) -> None:
    ids = torch.randint(0, 3, (2, 90), generator=torch.Generator().manual_seed(5)) * 7  # in no order
    padding = torch.arange(90)[None] >= torch.tensor([[0], [9]])
    options = {"hash": family, "probes": 1, "rounds": 2}
    source, levels = levels_of(90, 90, causal=causal, batch=2, padding=padding, ids=(ids, ids), **options)
    both(source, levels, (2, 90, 90, 16))


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_whose_document_has_no_key(family: str) -> None:
    ids = torch.tensor([[0, 0, 4, 9]]), torch.tensor([[0] * 40 + [9] * 30])
    source, levels = levels_of(4, 70, causal=False, ids=ids, hash=family, rounds=2)
    assert levels.queries[0, 2] == -1
    both(source, levels, (1, 4, 70, 16))


@pytest.mark.parametrize("family", FAMILIES)
def test_many_functions(family: str) -> None:
    source, levels = levels_of(20, 80, causal=False, hash=family, rounds=20)
    both(source, levels, (1, 20, 80, 16))


@pytest.mark.parametrize("probes", [0, 7])
def test_two_polytopes(probes: int) -> None:
    source, levels = levels_of(40, 900, causal=True, dim=8, hash="cross_polytope", rounds=1, probes=probes)
    assert levels.most > 4  # one polytope of 8 dimensions has 4 bits
    both(source, levels, (1, 40, 900, 8))


def test_more_probes_than_buckets() -> None:
    source, levels = levels_of(9, 60, causal=False, hash="cross_polytope", rounds=1, probes=20, max_planes=3)
    both(source, levels, (1, 9, 60, 16))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dim", "dtype"), [(5, torch.float32), (40, torch.float16), (72, torch.float64)], ids=str)
def test_dims_and_dtypes(family: str, dim: int, dtype: torch.dtype) -> None:
    source, levels = levels_of(30, 65, causal=True, dim=dim, hash=family, rounds=1)
    both(source, levels, (1, 30, 65, dim), dtype)


def test_many_tiles_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that few keys fill many; queries and keys laid out ``[B, N, H, D]``."""
    monkeypatch.setattr(triton_cuda, "_LEAST_TILE", 64)
    source, levels = levels_of(10, 400, causal=True, rounds=2)
    q, k = whole_numbers(1, 10, 4, 16).transpose(1, 2), whole_numbers(1, 400, 2, 16, seed=1).transpose(1, 2)
    planes = whole_numbers(*source.planes.shape, seed=2, high=9)
    options = {"family": "hyperplane", "center": False}
    got, want = (lsh_slices(q, k, planes, levels, **options, backend=backend) for backend in ("triton", "torch"))
    assert members(*got) == members(*want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "causal", "padded", "padded causal", "documents causal", "float32 causal"])
def test_centred_keys(family: str, kind: str) -> None:
    """Keys far from the origin: without centering, all would fall into one bucket."""
    dtype = torch.float32 if "float32" in kind else torch.bfloat16
    ids = (torch.arange(200)[None] // 70,) * 2 if "documents" in kind else None
    padding = torch.arange(200)[None] % 11 > 0 if "padded" in kind else None
    source, levels = levels_of(
        200, 200, causal="causal" in kind, padding=padding, ids=ids, hash=family, rounds=2, probes=1
    )
    q, k = torch.randn(1, 4, 200, 16).to(dtype), (torch.randn(1, 2, 200, 16) + 30).to(dtype)
    got, want = (
        members(*lsh_slices(q, k, source.planes, levels, family=family, probes=1, backend=backend))
        for backend in ("triton", "torch")
    )
    same = sum(a == b for a, b in zip(got, want, strict=True))
    assert same > 0.99 * len(want)


def test_codes_do_not_look_ahead() -> None:
    """A change of later keys, to NaN even, changes nothing for earlier queries."""
    source, levels = levels_of(260, 260, causal=True, rounds=2)
    q, k = torch.randn(1, 4, 260, 16), torch.randn(1, 2, 260, 16)
    later = k.clone()
    later[:, :, 150:] = float("nan")
    before, after = (
        members(*lsh_slices(q, x, source.planes, levels, family="hyperplane", backend="triton")) for x in (k, later)
    )
    places = torch.arange(260).repeat(4, 1).flatten().repeat_interleave(2).tolist()
    for place, a, b in zip(places, before, after, strict=True):
        if place < 150:
            assert [key for key in a if key <= place] == [key for key in b if key <= place]


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(FAMILIES),
    probes=st.integers(0, 5),
    rounds=st.integers(1, 3),
    bits=st.integers(1, 7),
    keys=st.integers(25, 120),
    queries=st.integers(1, 30),
    causal=st.booleans(),
)
def test_any_settings(family: str, probes: int, rounds: int, bits: int, keys: int, queries: int, causal: bool) -> None:
    queries = min(queries, keys)
    options = {"hash": family, "probes": probes, "rounds": rounds, "max_planes": bits}
    source, levels = levels_of(queries, keys, causal=causal, **options)
    both(source, levels, (1, queries, keys, 16))


def test_calls_that_the_backend_refuses() -> None:
    source, levels = levels_of(4, 100, causal=False, dim=300, rounds=1)
    q, k = torch.zeros(1, 4, 4, 300), torch.zeros(1, 2, 100, 300)
    with pytest.raises(BackendUnavailableError, match=r"backend 'triton' cannot hash here: .* up to 256, got 300"):
        lsh_slices(q, k, source.planes, levels, family="hyperplane", backend="triton")
    source, levels = levels_of(4, 100, causal=False, rounds=1)
    q, k = torch.zeros(1, 4, 4, 16), torch.zeros(1, 2, 100, 16)
    with pytest.raises(BackendUnavailableError, match="up to 255 probes"):
        lsh_slices(q, k, source.planes, levels, family="hyperplane", backend="triton", probes=300)
