"""The op that hashes: every implementation against the one in torch, on inputs whose projections are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.lsh_slices import HashLevels, lsh_slices
from ssa_framework.ops.lsh_slices.numba_hash import STRIP
from ssa_framework.source import LayerSpec, RoutingContext
from ssa_plugins.lsh import LSH

FAMILIES = ["hyperplane", "cross_polytope"]


def whole_numbers(*shape: int, seed: int = 0, high: int = 40) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def members(order: Tensor, start: Tensor, end: Tensor) -> list[list[int]]:
    """The keys of every slice, slice by slice: ``order [B, Hkv, S, L]``, bounds ``[B, G, N, S, P]``."""
    order = order.repeat_interleave(start.shape[1] // order.shape[1], dim=1)
    found = []
    for orders, starts, ends in zip(*(x.flatten(0, 1).tolist() for x in (order, start, end)), strict=True):
        for query_starts, query_ends in zip(starts, ends, strict=True):
            for s, bounds in enumerate(zip(query_starts, query_ends, strict=True)):
                found += [orders[s][low:high] for low, high in zip(*bounds, strict=True)]
    return found


def levels_of(
    queries: int, keys: int, *, causal: bool, options: dict, padding: Tensor | None = None, ids: tuple | None = None
) -> tuple[LSH, HashLevels]:
    """What the ``lsh`` source asks for."""
    heads = 4
    layer = LayerSpec(head_dim=16, num_heads=heads, num_kv_heads=2, graph_heads=heads, num_neighbors=24)
    source = LSH(layer, candidates=12, **options)
    q, k = torch.zeros(2, heads, queries, 16), torch.zeros(2, 2, keys, 16)
    mask = make_edge_mask(
        batch=2,
        heads=heads,
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


def both(source: LSH, levels: HashLevels, queries: int, keys: int, center: bool = False) -> None:
    q, k = whole_numbers(2, 4, queries, 16), whole_numbers(2, 2, keys, 16, seed=1)
    planes = whole_numbers(*source.planes.shape, seed=2, high=9)
    got, want = (
        lsh_slices(q, k, planes, levels, family=source.hash, probes=source.probes, center=center, backend=backend)
        for backend in ("numba", "torch")
    )
    assert members(*got) == members(*want)
    assert got[0].shape[-1] <= levels.longest
    for x in got:
        assert x.dtype == torch.int32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("probes", [0, 1, 5])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (65, 300), (301, 301)])
def test_implementations_agree(family: str, probes: int, causal: bool, queries: int, keys: int) -> None:
    options = {"hash": family, "probes": probes, "rounds": 3}
    both(*levels_of(queries, keys, causal=causal, options=options), queries, keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_documents_and_padding(family: str, causal: bool) -> None:
    ids = torch.randint(0, 3, (2, 150), generator=torch.Generator().manual_seed(5)).sort(dim=1).values * 7
    padding = torch.arange(150)[None] >= torch.tensor([[0], [9]])
    options = {"hash": family, "probes": 2, "rounds": 2}
    source, levels = levels_of(150, 150, causal=causal, options=options, padding=padding, ids=(ids, ids))
    both(source, levels, 150, 150)


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_are_spread_over_several_strips(family: str) -> None:
    source, levels = levels_of(80, 700, causal=False, options={"hash": family, "rounds": 40})
    assert source.planes.shape[0] * source.planes.shape[1] > 2 * STRIP
    both(source, levels, 80, 700)


def test_two_polytopes() -> None:
    source, levels = levels_of(70, 600, causal=True, options={"hash": "cross_polytope", "rounds": 2, "probes": 30})
    source, levels = levels_of(
        70, 3000, causal=True, options={"hash": "cross_polytope", "rounds": 2, "probes": 7, "max_planes": 10}
    )
    assert levels.most > 5  # one polytope of 16 dimensions has 5 bits
    both(source, levels, 70, 3000)


@pytest.mark.parametrize("threads", [1, 3])
def test_centred_codes_do_not_depend_on_what_is_hashed_with_them(threads: int) -> None:
    """One head on several threads, and a prefix alone: the same slices, bit for bit."""
    source, levels = levels_of(400, 400, causal=True, options={"rounds": 40})
    _, shorter = levels_of(200, 200, causal=True, options={"rounds": 40})
    q, k = torch.randn(2, 4, 400, 16), torch.randn(2, 2, 400, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = lsh_slices(q, k, source.planes, levels, family="hyperplane")
        prefix = lsh_slices(q[:, :, :200], k[:, :, :200], source.planes, shorter, family="hyperplane")
    finally:
        torch.set_num_threads(before)
    rows = members(whole[0], whole[1][:, :, :200], whole[2][:, :, :200])
    places = torch.arange(200).repeat(2 * 4, 1).flatten().repeat_interleave(40)
    cut = [[key for key in keys if key <= place] for keys, place in zip(rows, places.tolist(), strict=True)]
    alone = members(*prefix)
    assert cut == [[k for k in keys if k <= place] for keys, place in zip(alone, places.tolist(), strict=True)]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_hash_as_float32(dtype: torch.dtype, center: bool) -> None:
    source, levels = levels_of(65, 200, causal=False, options={})
    q, k = torch.randn(2, 4, 65, 16).to(dtype), torch.randn(2, 2, 200, 16).to(dtype)
    options = {"family": "hyperplane", "center": center}
    got = lsh_slices(q, k, source.planes, levels, **options)
    want = lsh_slices(q.float(), k.float(), source.planes, levels, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    probes=st.integers(0, 12),
    rounds=st.integers(1, 5),
    bits=st.integers(1, 10),
    keys=st.integers(25, 260),
    queries=st.integers(1, 60),
    causal=st.booleans(),
)
def test_any_settings(family: str, probes: int, rounds: int, bits: int, keys: int, queries: int, causal: bool) -> None:
    queries = min(queries, keys)
    options = {"hash": family, "probes": probes, "rounds": rounds, "max_planes": bits}
    both(*levels_of(queries, keys, causal=causal, options=options), queries, keys)


def test_bad_input() -> None:
    source, levels = levels_of(65, 200, causal=False, options={})
    q, k = torch.randn(2, 4, 65, 16), torch.randn(2, 2, 200, 16)
    with pytest.raises(ShapeError, match="G a multiple of Hkv"):
        lsh_slices(q[:, :3], k, source.planes, levels, family="hyperplane")
    with pytest.raises(ShapeError, match=r"directions must be \[S, F, D\] with F >= "):
        lsh_slices(q, k, source.planes[:, :1], levels, family="hyperplane")
    with pytest.raises(ConfigError, match="family must be one of hyperplane, cross_polytope, got 'minhash'"):
        lsh_slices(q, k, source.planes, levels, family="minhash")  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="serves CPU tensors, got meta"):
        lsh_slices(q.to("meta"), k.to("meta"), torch.ones(1, 12, 16), levels, family="hyperplane", backend="numba")
