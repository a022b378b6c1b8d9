"""What each built-in source proposes, and what it refuses. (The lsh source has tests of its own.)"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.attention import SparseAttention, build_graph
from ssa_framework.config import SSAConfig
from ssa_framework.errors import BudgetError, ConfigError, MissingExtraError, UnknownOptionError
from ssa_framework.graph import NeighborGraph
from ssa_framework.registry import default_registry
from ssa_framework.source import LayerSpec, NeighborSource, create_source
from ssa_framework.testing import AttentionInputs, make_inputs, packed_ids
from ssa_plugins import faiss_index

Mix = Mapping[str, Mapping[str, Any]]


def route(
    inputs: AttentionInputs, mix: Mix, *, num_neighbors: int = 16, seed: int = 0, told: Any = None
) -> NeighborGraph:
    """The graph of a mix, checked. ``told``: what the last source of the mix is told with the call."""
    config = SSAConfig(sources=mix, num_neighbors=num_neighbors, seed=seed, dense_below=0)
    graph = build_graph(
        inputs.q,
        inputs.k,
        config=config,
        is_causal=inputs.causal,
        cross=inputs.cross,
        key_padding_mask=inputs.key_padding_mask,
        segment_ids=inputs.segment_ids,
        query_positions=inputs.query_positions,
        source_inputs=None if told is None else {list(mix)[-1]: told},
    )
    graph.validate()
    return graph


def edges_of(inputs: AttentionInputs, mix: Mix, **options: Any) -> Tensor:
    """The graph of a mix as bool ``[B, H, N, M]``."""
    return route(inputs, mix, **options).to_dense_mask()


def neighbors(mask: Tensor, query: int, batch: int = 0, head: int = 0) -> list[int]:
    return mask[batch, head, query].nonzero()[:, 0].tolist()


def layer(num_neighbors: int = 16, head_dim: int = 16) -> LayerSpec:
    return LayerSpec(head_dim=head_dim, num_heads=4, num_kv_heads=2, graph_heads=4, num_neighbors=num_neighbors)


def source(name: str, **options: Any) -> NeighborSource:
    return create_source(name, default_registry().get(name), layer(), options)


def expected_mask(inputs: AttentionInputs, rule: Tensor) -> Tensor:
    """``rule`` bool ``[N, M]`` for every head, where causality allows it."""
    mask = rule.expand(inputs.batch, inputs.heads, -1, -1)
    return mask & torch.ones_like(rule).tril() if inputs.causal else mask


causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])

# -- self, window, global, topk ----------------------------------------------------------------------------------


@causal_or_not
def test_self_is_the_diagonal(causal: bool) -> None:
    inputs = make_inputs(causal=causal)
    assert torch.equal(edges_of(inputs, {"self": {}}), expected_mask(inputs, torch.eye(63, dtype=torch.bool)))


@causal_or_not
@pytest.mark.parametrize("size", [0, 1, 5, 200])
def test_window_reaches_size_keys_on_both_sides(size: int, causal: bool) -> None:
    inputs = make_inputs(causal=causal)
    rows = torch.arange(63)
    near = (rows[:, None] - rows).abs() <= size
    assert torch.equal(edges_of(inputs, {"window": {"size": size}}), expected_mask(inputs, near))


@causal_or_not
@pytest.mark.parametrize(
    ("options", "columns"),
    [
        pytest.param({}, [0, 1], id="default"),
        pytest.param({"tokens": 0}, [], id="none"),
        pytest.param({"tokens": 100}, list(range(9)), id="more-than-there-are"),
        pytest.param({"indices": [4, 4, 0]}, [0, 4], id="indices"),
        pytest.param({"indices": [3, 8, 9, 1000]}, [3, 8], id="clamped-to-the-last-key"),
        pytest.param({"indices": []}, [], id="no-indices"),
    ],
)
def test_global_columns(options: dict[str, Any], columns: list[int], causal: bool) -> None:
    inputs = make_inputs(queries=9, causal=causal)
    rule = torch.zeros((9, 9), dtype=torch.bool)
    rule[:, columns] = True
    assert torch.equal(edges_of(inputs, {"global": options}), expected_mask(inputs, rule))


@pytest.mark.parametrize("case", [{}, {"causal": True}, {"padded": True}, {"packed": True, "causal": True}], ids=str)
def test_topk_is_the_exact_top(case: dict[str, Any]) -> None:
    inputs = make_inputs(**case)
    scores = inputs.q @ inputs.k.repeat_interleave(2, dim=1).transpose(-1, -2)
    everything = edges_of(inputs, {"window": {"size": 63}})
    best = torch.zeros_like(everything).scatter_(-1, scores.masked_fill(~everything, -torch.inf).topk(16).indices, True)
    assert torch.equal(edges_of(inputs, {"topk": {}}), best & everything)


# -- random ------------------------------------------------------------------------------------------------------


def test_random_links_are_uniform_over_the_keys() -> None:
    inputs = make_inputs(queries=1000, keys=40, cross=True, batch=1, head_dim=2)
    counts = edges_of(inputs, {"random": {"links": 1}}).sum(dim=(0, 1, 2)).double()
    mean = 4 * 1000 / 40
    assert int(counts.sum()) == 4000
    chi_squared = float(((counts - mean) ** 2 / mean).sum())
    assert 14 < chi_squared < 77  # 39 degrees of freedom: outside with a probability below 0.001


def test_random_links_are_uniform_over_the_past() -> None:
    inputs = make_inputs(queries=2000, causal=True, batch=1, head_dim=2)
    mask = edges_of(inputs, {"random": {"links": 1}})[0, :, 200:]
    place = mask.int().argmax(-1).double() / torch.arange(200, 2000)
    deciles = torch.histc(place, bins=10, min=0.0, max=1.0)
    mean = 4 * 1800 / 10
    assert bool(mask.sum(-1).eq(1).all())
    assert float(((deciles - mean) ** 2 / mean).sum()) < 28  # 9 degrees of freedom, probability 0.001


def test_random_slots_are_independent() -> None:
    inputs = make_inputs(queries=2000, keys=2000, batch=1, heads=1, kv_heads=1, head_dim=2, cross=True)
    first = edges_of(inputs, {"random": {"links": 1}})
    both = edges_of(inputs, {"random": {"links": 2}})
    assert bool((both | ~first).all())
    second = (both & ~first)[0, 0].int().argmax(-1).double()
    correlation = torch.corrcoef(torch.stack([first[0, 0].int().argmax(-1).double(), second]))[0, 1]
    assert abs(float(correlation)) < 0.08  # 3.5 standard deviations


@pytest.mark.parametrize("name", ["random", "strided"])
@pytest.mark.parametrize("length", [1, 17, 64])
def test_fixed_patterns_are_stable_under_growth(name: str, length: int) -> None:
    """Causal: what a query attends does not depend on how many tokens follow."""
    whole = make_inputs(queries=65, causal=True)
    part = make_inputs(queries=length, causal=True)
    options = {"links": 4} if name == "random" else {"stride": 3}
    assert torch.equal(edges_of(whole, {name: options})[:, :, :length, :length], edges_of(part, {name: options}))


def test_random_links_of_heads_elements_and_seeds() -> None:
    inputs = make_inputs(queries=65)
    own = edges_of(inputs, {"random": {}})
    shared = edges_of(inputs, {"random": {"per_head": False}})
    assert torch.equal(own[0], own[1])
    assert not torch.equal(own[:, 0], own[:, 1])
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    for seed in (1, 2**32, 2**40 + 1):
        assert not torch.equal(edges_of(inputs, {"random": {}}, seed=seed), own)


@causal_or_not
def test_random_links_stay_in_the_document_and_between_the_padding(causal: bool) -> None:
    packed = make_inputs(packed=True, causal=causal, queries=65)
    assert packed.segment_ids is not None
    counts = edges_of(packed, {"random": {"links": 8}}, num_neighbors=64).sum(-1)
    assert int(counts.min()) >= 1  # a link outside the span would have been dropped
    padded = make_inputs(padded=True, batch=2, queries=65)
    inside = edges_of(padded, {"random": {"links": 1}}).sum(-1)
    assert bool(inside.eq(1).all())


# -- strided -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "causal", "query", "keys"),
    [
        pytest.param({"stride": 4, "count": 3}, True, 20, [8, 12, 16], id="causal"),
        pytest.param({"stride": 4, "count": 3}, True, 7, [3], id="causal-near-the-start"),
        pytest.param({"stride": 4, "count": 3}, True, 3, [], id="causal-before-the-first"),
        pytest.param({"stride": 4, "count": 2}, False, 20, [12, 16, 24, 28], id="both-sides"),
        pytest.param({"stride": 4, "count": 2}, False, 61, [53, 57], id="near-the-end"),
        pytest.param({"stride": 1, "count": 2}, False, 5, [3, 4, 6, 7], id="stride-1"),
        pytest.param({"stride": 4}, True, 62, [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58], id="all"),
        pytest.param({"stride": 2}, True, 62, list(range(30, 62, 2)), id="as-many-as-the-budget-holds"),
        pytest.param({"stride": 2}, False, 31, [*range(15, 31, 2), *range(33, 49, 2)], id="nearest-of-both-sides"),
        pytest.param({"stride": 2}, False, 4, [0, 2, *range(6, 34, 2)], id="the-other-side-takes-what-is-left"),
        pytest.param({"stride": 100}, False, 4, [], id="longer-than-the-sequence"),
        pytest.param({"stride": 8, "pattern": "fixed"}, True, 20, [7, 15], id="fixed-causal"),
        pytest.param({"stride": 8, "pattern": "fixed"}, True, 23, [7, 15, 23], id="fixed-causal-own-key"),
        pytest.param({"stride": 8, "pattern": "fixed", "count": 1}, True, 30, [23], id="fixed-causal-count"),
        pytest.param({"stride": 8, "pattern": "fixed", "count": 1}, False, 30, [23, 31], id="fixed-both-sides"),
        pytest.param({"stride": 8, "pattern": "fixed"}, False, 0, [7, 15, 23, 31, 39, 47, 55], id="fixed-all"),
        pytest.param({"stride": 3, "pattern": "fixed"}, False, 31, [*range(8, 56, 3)], id="fixed-nearest"),
    ],
)
def test_strided_keys(options: dict[str, Any], causal: bool, query: int, keys: list[int]) -> None:
    inputs = make_inputs(causal=causal)
    mask = edges_of(inputs, {"strided": options})
    assert neighbors(mask, query) == keys
    assert torch.equal(mask, mask[:1, :1].expand_as(mask))


def test_strided_shares_the_budget_with_what_stands_before_it() -> None:
    inputs = make_inputs(causal=True)
    mask = edges_of(inputs, {"window": {"size": 3}, "global": {"tokens": 2}, "strided": {"stride": 5}})
    assert neighbors(mask, 62) == [0, 1, *range(12, 62, 5), 59, 60, 61, 62]  # 10 strides beside 4 and 2
    assert int(mask.sum(-1).max()) == 16


def test_strided_spends_nothing_outside_the_document() -> None:
    inputs = make_inputs(packed=True, batch=1)
    ids = packed_ids(1, 63)[0]
    mask = edges_of(inputs, {"strided": {"stride": 2}}, num_neighbors=8)
    middle = int((ids == 3).nonzero()[2])
    assert len(neighbors(mask, middle)) == 8
    assert all(int(ids[key]) == 3 for key in neighbors(mask, middle))


def test_strided_follows_irregular_positions() -> None:
    inputs = make_inputs(queries=3, keys=65, chunk=True, causal=True)
    at = torch.tensor([[50, 3, 11], [64, 10, 10]])
    mask = edges_of(
        AttentionInputs(inputs.q, inputs.k, inputs.v, causal=True, query_positions=at), {"strided": {"stride": 5}}
    )
    assert neighbors(mask, 0) == list(range(0, 50, 5))
    assert neighbors(mask, 1) == []
    assert neighbors(mask, 2) == [1, 6]
    assert neighbors(mask, 0, batch=1) == list(range(4, 64, 5))


# -- edges -------------------------------------------------------------------------------------------------------


def adjacency(rows: list[int], columns: list[int], queries: int, keys: int) -> Tensor:
    mask = torch.zeros((queries, keys), dtype=torch.bool)
    mask[rows, columns] = True
    return mask


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_edges_are_the_graph(data: st.DataObject) -> None:
    """Any edge list, with repeats and in any order, as list or tensor, and as CSR."""
    queries, keys = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, queries - 1), st.integers(0, keys - 1)), max_size=30))
    rows, columns = [a for a, _ in pairs], [b for _, b in pairs]
    inputs = make_inputs(queries=queries, keys=keys, cross=True)
    wanted = adjacency(rows, columns, queries, keys).expand(2, 4, -1, -1)
    as_csr = sorted(pairs)
    indptr = [sum(a < row for a, _ in pairs) for row in range(queries + 1)]
    for given_edges in (
        {"edge_index": [rows, columns]},
        {"edge_index": torch.tensor([rows, columns], dtype=torch.int32)},
        {"csr": (indptr, [b for _, b in as_csr])},
        {"csr": [torch.tensor(indptr), torch.tensor([b for _, b in as_csr], dtype=torch.int64)]},
    ):
        assert torch.equal(edges_of(inputs, {"edges": {}}, told=given_edges), wanted)
        assert torch.equal(edges_of(inputs, {"edges": given_edges}), wanted)


def test_edges_of_each_batch_element() -> None:
    inputs = make_inputs(queries=5, batch=3)
    mask = edges_of(inputs, {"edges": {}}, told=torch.tensor([[0, 2, 2], [1, 4, 4], [3, 0, 1]]))
    assert neighbors(mask, 1, batch=0) == [3]
    assert neighbors(mask, 4, batch=2) == [0, 1]
    assert int(mask.sum()) == 3 * 4  # heads share the graph


def test_edges_obey_causality_and_other_sources_add_to_them() -> None:
    inputs = make_inputs(queries=4, causal=True)
    mask = edges_of(inputs, {"self": {}, "edges": {"edge_index": [[0, 2, 3], [3, 1, 3]]}})
    assert [neighbors(mask, i) for i in range(4)] == [[0], [1], [1, 2], [3]]


def test_edges_are_kept_before_content() -> None:
    inputs = make_inputs(queries=40)
    scores = inputs.q @ inputs.k.repeat_interleave(2, dim=1).transpose(-1, -2)
    worst = int(scores[0, 0, 0].argmin())
    mask = edges_of(inputs, {"topk": {}, "edges": {"edge_index": [[0], [worst]]}})
    assert worst in neighbors(mask, 0)
    assert len(neighbors(mask, 0)) == 16


def test_edges_with_a_call_come_before_the_option() -> None:
    inputs = make_inputs(queries=5)
    option = {"edges": {"edge_index": [[0], [1]]}}
    assert neighbors(edges_of(inputs, option), 0) == [1]
    for told in ([[0], [2]], torch.tensor([[0], [2]]), {"edge_index": [[0], [2]]}, {"csr": ([0, 1, 1, 1, 1, 1], [2])}):
        mask = edges_of(inputs, option, told=told)
        assert neighbors(mask, 0) == [2]
        assert int(mask.sum()) == 8


@pytest.mark.parametrize(
    "options",
    [{"edge_index": [[0, 1, 1], [1, 0, 2]]}, {"csr": [[0, 1, 3, 3], [1, 0, 2]]}],
    ids=["edge-list", "csr"],
)
def test_edges_survive_json(options: dict[str, Any]) -> None:
    config = SSAConfig(d_model=64, num_heads=4, sources={"self": {}, "edges": options}, dense_below=0)
    read = SSAConfig.from_json(config.to_json())
    assert read.source_mix == config.source_mix
    x = torch.randn((2, 3, 64), generator=torch.Generator().manual_seed(0))
    attention = SparseAttention(read)
    q, k, _ = attention.project(x)
    wanted = adjacency([0, 1, 1, 0, 1, 2], [1, 0, 2, 0, 1, 2], 3, 3)
    assert torch.equal(attention.build_graph(q, k).to_dense_mask()[1, 3], wanted)


def test_repeated_edges_cost_no_budget() -> None:
    inputs = make_inputs(queries=20)
    repeated = torch.tensor([[3] * 16 * 5, list(range(16)) * 5])
    mask = edges_of(inputs, {"edges": {}}, told=repeated)
    assert neighbors(mask, 3) == list(range(16))


@pytest.mark.parametrize(
    ("mix", "slots"),
    [
        pytest.param({}, 16, id="alone"),
        pytest.param({"self": {}}, 15, id="beside-self"),
        pytest.param({"window": {"size": 2}, "global": {"tokens": 1}}, 10, id="beside-window-and-global"),
    ],
)
def test_too_many_edges_name_the_query_and_what_would_do(mix: Mix, slots: int) -> None:
    inputs = make_inputs(queries=40, batch=1)
    degree = 20
    edges = torch.tensor([[0, *[7] * degree], [0, *range(12, 12 + degree)]])
    enough = 16 - slots + degree
    message = rf"query 7 has {degree} neighbors, num_neighbors = 16 leaves {slots} .* num_neighbors = {enough} would do"
    with pytest.raises(BudgetError, match=message):
        route(inputs, {**mix, "edges": {}}, told=edges)
    mask = edges_of(inputs, {**mix, "edges": {}}, told=edges, num_neighbors=enough)
    assert set(range(12, 12 + degree)) <= set(neighbors(mask, 7))


def test_too_many_edges_name_the_batch_element() -> None:
    inputs = make_inputs(queries=40, batch=2)
    edges = torch.tensor([[1] * 20, [5] * 20, list(range(20))])
    with pytest.raises(BudgetError, match="query 5 of batch element 1 has 20 neighbors"):
        route(inputs, {"edges": {}}, told=edges)


def test_too_many_edges_where_band_and_columns_take_everything() -> None:
    inputs = make_inputs(queries=40, batch=1, causal=True)
    mix = {"window": {"size": 1}, "edges": {"edge_index": [[30] * 12, list(range(12))]}}
    with pytest.raises(BudgetError, match="num_neighbors = 14 would do"):
        route(inputs, mix, num_neighbors=2)
    assert neighbors(edges_of(inputs, mix, num_neighbors=14), 30) == [*range(12), 29, 30]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        pytest.param(
            None, r"no edges given; pass edge_index .* or csr .* source_inputs=\{'edges': \.\.\.\}", id="none"
        ),
        pytest.param({}, "must have the key 'edge_index' or 'csr', got none", id="empty-dict"),
        pytest.param({"edges": [[0], [1]]}, r"must have the key .* got \['edges'\]", id="unknown-key"),
        pytest.param({"edge_index": [[0], [1]], "csr": ([0, 1], [0])}, "either edge_index or csr, got both", id="both"),
        pytest.param({"csr": None}, "either edge_index or csr, got neither", id="neither"),
        pytest.param([[0], [1], [2], [3]], r"\[2, E\].* got \[4, 1\]", id="four-rows"),
        pytest.param([0, 1], r"\[2, E\].* got \[2\]", id="one-dimension"),
        pytest.param([[0, 1], [1]], "edge_index must be an integer tensor or nested lists", id="ragged"),
        pytest.param("edges", "edge_index must be an integer tensor", id="text"),
        pytest.param([[0.0], [1.0]], "edge_index must be integers, got torch.float32", id="float"),
        pytest.param(torch.ones((2, 1), dtype=torch.bool), "must be integers, got torch.bool", id="bool"),
        pytest.param([[0, 5], [1, 1]], r"query must lie in \[0, 5\), edge 1 has query 5", id="query"),
        pytest.param([[0, -1], [1, 1]], r"query must lie in \[0, 5\), edge 1 has query -1", id="negative-query"),
        pytest.param([[0, 1], [1, 5]], r"key must lie in \[0, 5\), edge 1 has key 5", id="key"),
        pytest.param([[2], [1], [1]], r"batch must lie in \[0, 2\), edge 0 has batch 2", id="batch"),
        pytest.param({"csr": ([0, 1], [0])}, "2 entries, so 1 queries; this call has 5", id="csr-length"),
        pytest.param({"csr": ([0, 2, 1, 2, 2, 2], [0, 1])}, "must not decrease, it does after entry 1", id="csr-falls"),
        pytest.param(
            {"csr": ([0, 0, 0, 0, 0, 1], [0, 1])}, "from 0 to the number of indices, 2; .* 0 to 1", id="csr-end"
        ),
        pytest.param({"csr": ([1, 1, 1, 1, 1, 2], [0, 1])}, "goes from 1 to 2", id="csr-start"),
        pytest.param({"csr": ([0, 1, 1, 1, 1, 1], [9])}, r"key must lie in \[0, 5\), edge 0 has key 9", id="csr-key"),
        pytest.param({"csr": [0, 1, 2]}, r"csr must be a pair \(indptr \[N \+ 1\], indices \[E\]\)", id="csr-no-pair"),
        pytest.param({"csr": ([[0, 1]], [0])}, r"got \[1, 2\] and \[1\]", id="csr-rank"),
        pytest.param({"csr": ([], [])}, r"got \[0\] and \[0\]", id="csr-empty"),
    ],
)
def test_edges_that_make_no_sense(told: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(make_inputs(queries=5), {"edges": {}}, told=told)


def test_edges_of_an_option_are_checked_at_construction() -> None:
    with pytest.raises(ConfigError, match=r"\[2, E\].* got \[4, 1\]"):
        source("edges", edge_index=[[0], [1], [2], [3]])
    with pytest.raises(ConfigError, match="either edge_index or csr, got both"):
        source("edges", edge_index=[[0], [1]], csr=([0, 1], [0]))


def test_edges_follow_the_module_and_stay_out_of_the_state_dict() -> None:
    edges = source("edges", edge_index=torch.tensor([[0], [1]]))
    assert edges.state_dict() == {}
    assert isinstance(edges.edge_index, Tensor)
    moved = edges.to("meta").edge_index
    assert isinstance(moved, Tensor)
    assert moved.device.type == "meta"


# -- faiss -------------------------------------------------------------------------------------------------------

EXACT: dict[str, Any] = {
    "one-block": {},
    "small-blocks": {"block": 16},
    "odd-blocks": {"block": 7},
    "all-lists": {"index": "IVF4,Flat", "nprobe": 4, "train_size": 20, "block": 16},
    "too-few-keys-to-train": {"index": "IVF64,Flat", "block": 16},
    "too-few-keys-for-a-code-book": {"index": "PQ4", "block": 16},
    "wide-queue": {"index": "HNSW16", "ef_search": 64, "block": 16},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"causal": True},
        {"kv_heads": 1, "causal": True},
        {"padded": True, "batch": 4, "causal": True},
        {"packed": True},
        {"packed": True, "padded": True, "causal": True},
        {"queries": 9, "keys": 63, "chunk": True, "causal": True},
        {"queries": 70, "keys": 50, "cross": True},
    ],
    ids=str,
)
def test_faiss_equals_topk_where_its_index_is_exact(case: dict[str, Any], options: dict[str, Any]) -> None:
    inputs = make_inputs(**case).to(torch.float32)
    mix = {"self": {}, "window": {"size": 1}, "global": {}}
    found = edges_of(inputs, {**mix, "faiss": options})
    assert torch.equal(found, edges_of(inputs, {**mix, "topk": {}}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_faiss_works_in_any_dtype(dtype: torch.dtype) -> None:
    inputs = make_inputs(queries=65, causal=True).to(dtype)
    assert torch.equal(edges_of(inputs, {"self": {}, "faiss": {}}), edges_of(inputs, {"self": {}, "topk": {}}))


@pytest.mark.parametrize(
    ("options", "recall", "scored"),
    [
        pytest.param({"index": "IVF16,Flat", "nprobe": 4}, 0.4, 0.4, id="ivf"),
        pytest.param({"index": "HNSW16"}, 0.8, 0.6, id="hnsw"),
        pytest.param({"index": "PQ8"}, 0.5, 1.0, id="pq"),
        pytest.param({"index": "PCA8,IVF8,Flat", "nprobe": 4}, 0.1, 0.6, id="pca-ivf"),
        pytest.param({"index": "IVF16,SQ8,RFlat", "nprobe": 4}, 0.4, 0.4, id="refined"),
    ],
)
@causal_or_not
def test_faiss_approximates(options: dict[str, Any], recall: float, scored: float, causal: bool) -> None:
    """Recall well above chance (16 of 600 keys: 3%), for the keys that it says it scored."""
    inputs = make_inputs(queries=600, causal=causal, batch=1, heads=2, kv_heads=1).to(torch.float32)
    if causal:
        trained = {} if options["index"] == "HNSW16" else {"train_size": 256}
        options = {**options, **trained, "block": 128}
    graph = route(inputs, {"faiss": options})
    exact = edges_of(inputs, {"topk": {}})
    assert float((graph.to_dense_mask() & exact).sum() / exact.sum()) > recall
    choice = 300.5 if causal else 600
    assert 16 < graph.keys_scored()["faiss"] <= (0.9 if causal and scored < 1 else scored) * choice


def test_faiss_flat_says_that_it_scored_everything() -> None:
    inputs = make_inputs(queries=63, causal=True, packed=True)
    assert inputs.segment_ids is not None
    allowed = edges_of(inputs, {"window": {"size": 63}}).sum(-1).double().mean()
    for block in (8, 512):
        scored = route(inputs, {"faiss": {"block": block}}).keys_scored()["faiss"]
        assert scored == pytest.approx(float(allowed))


def test_faiss_is_exact_until_it_is_trained() -> None:
    """The index is trained at the first block that has 128 keys before it; one list of 16 cannot hold the best keys."""
    inputs = make_inputs(queries=300, causal=True, batch=1).to(torch.float32)
    found = edges_of(inputs, {"faiss": {"index": "IVF16,Flat", "train_size": 100, "block": 64}})
    exact = edges_of(inputs, {"topk": {}})
    assert torch.equal(found[:, :, :128], exact[:, :, :128])
    assert not torch.equal(found[:, :, 128:], exact[:, :, 128:])


@pytest.mark.parametrize("options", [{}, {"index": "HNSW8"}, {"index": "IVF4,Flat", "train_size": 32}], ids=str)
def test_faiss_chunks_equal_prefill(options: dict[str, Any]) -> None:
    options = {**options, "block": 16}
    whole = make_inputs(queries=100, causal=True).to(torch.float32)
    mask = edges_of(whole, {"faiss": options})
    for first, last in ((0, 33), (33, 34), (34, 100)):
        chunk = AttentionInputs(
            whole.q[:, :, first:last],
            whole.k[:, :, :last],
            whole.v[:, :, :last],
            causal=True,
            query_positions=torch.arange(first, last),
        )
        assert torch.equal(edges_of(chunk, {"faiss": options}), mask[:, :, first:last, :last])


def test_faiss_takes_irregular_positions() -> None:
    inputs = make_inputs(queries=4, keys=100, chunk=True, causal=True).to(torch.float32)
    at = torch.tensor([[70, 0, 99, 3], [3, 3, 50, 120]])
    inputs = AttentionInputs(inputs.q, inputs.k, inputs.v, causal=True, query_positions=at)
    assert torch.equal(edges_of(inputs, {"faiss": {"block": 16}}), edges_of(inputs, {"topk": {}}))


@pytest.mark.parametrize("index", ["Flat", "HNSW8", "IVF4,Flat"])
def test_faiss_survives_vectors_that_are_not_finite(index: str) -> None:
    inputs = make_inputs(queries=65)
    inputs.k[0, 0, 7] = float("nan")
    inputs.k[0, 1, 9, 3] = float("inf")
    inputs.q[1, 2, 11] = float("nan")
    degree = route(inputs, {"faiss": {"index": index}}).degree()
    finite = torch.ones_like(degree, dtype=torch.bool)
    finite[1, 2, 11] = False
    assert int(degree[finite].min()) > 0


def test_faiss_builds_one_index_for_each_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    class Counted(faiss_index._KeyIndex):
        def add(self, keys: Tensor, positions: Tensor) -> None:
            built.append(keys.shape[0])
            super().add(keys, positions)

    monkeypatch.setattr(faiss_index, "_KeyIndex", Counted)
    route(make_inputs(heads=8, kv_heads=2, batch=3, queries=20), {"faiss": {}})
    assert built == [20] * 6
    built.clear()
    route(make_inputs(heads=8, kv_heads=2, batch=4, queries=20, padded=True), {"faiss": {}})
    assert built == [16, 16, 16, 16, 19, 19, 20, 20]


def test_faiss_prints_nothing_and_leaves_its_threads_alone(capfd: pytest.CaptureFixture[str]) -> None:
    threads = faiss.omp_get_max_threads()
    for index in ("IVF16,Flat", "IVF4_HNSW4,Flat"):
        route(make_inputs(queries=65), {"faiss": {"index": index}})
    assert faiss.omp_get_max_threads() == threads
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss_index._load_faiss.cache_clear()
    yield
    faiss_index._load_faiss.cache_clear()


@pytest.mark.usefixtures("without_faiss")
def test_faiss_missing_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'ssa-framework\[faiss\]'"):
        source("faiss")
    with pytest.raises(ImportError):
        route(make_inputs(queries=5), {"faiss": {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"index": "Flatt"}, r"index 'Flatt' does not work .*examples that work: 'Flat', 'IVF64,Flat'", id="typo"
        ),
        pytest.param({"index": ""}, "index '' does not work", id="empty"),
        pytest.param({"index": "LSH"}, "does not work for inner products", id="metric"),
        pytest.param({"index": "PQ7"}, "d should be a multiple|multiple of the number of subquantizers", id="dim"),
        pytest.param({"index": "IDMap,Flat"}, "add does not make sense", id="no-plain-add"),
        pytest.param({"index": "HNSW0"}, "HNSW needs at least 2 links", id="hnsw-0"),
        pytest.param({"index": "HNSW1"}, "HNSW needs at least 2 links", id="hnsw-1"),
        pytest.param({"index": "IVF0,Flat"}, "IVF needs at least one list", id="ivf-0"),
        pytest.param({"index": 3}, "index_factory string such as 'Flat' or 'HNSW32', got 3", id="not-a-string"),
        pytest.param({"nprobe": 4}, "nprobe is for IVF indices such as 'IVF64,Flat', index is 'Flat'", id="nprobe"),
        pytest.param({"index": "IVF4,Flat", "ef_search": 4}, "ef_search is for HNSW indices", id="ef-search"),
        pytest.param({"train_size": 4}, "train_size is for indices that are trained", id="no-training"),
        pytest.param({"index": "IVF64,Flat", "train_size": 63}, "needs train_size >= 64, got 63", id="train-size"),
    ],
)
def test_faiss_refuses_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source("faiss", **options)


def test_faiss_index_that_cannot_grow_serves_no_causal_call() -> None:
    with pytest.raises(ConfigError, match="'NSG16' cannot grow, which causal attention needs; 'HNSW32' can"):
        route(make_inputs(causal=True), {"faiss": {"index": "NSG16"}})
    inputs = make_inputs(queries=400, batch=1, heads=1, kv_heads=1)
    graph = route(inputs, {"faiss": {"index": "NSG16"}})
    exact = edges_of(inputs, {"topk": {}})
    assert float((graph.to_dense_mask() & exact).sum() / exact.sum()) > 0.5


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("window", {"size": -1}, "window: size must be an integer >= 0, got -1"),
        ("window", {"size": 2.0}, "window: size must be an integer >= 0, got 2.0"),
        ("global", {"tokens": True}, "global: tokens must be an integer >= 0, got True"),
        ("global", {"indices": [0, -1]}, "global: indices must be integers >= 0"),
        ("random", {"links": 0}, "random: links must be an integer >= 1, got 0"),
        ("random", {"links": "3"}, "random: links must be an integer >= 1, got '3'"),
        ("random", {"per_head": 1}, "random: per_head must be True or False, got 1"),
        ("strided", {"stride": 0}, "strided: stride must be an integer >= 1, got 0"),
        ("strided", {"count": 0}, "strided: count must be an integer >= 1, got 0"),
        ("strided", {"pattern": "dilated"}, "pattern must be 'strided' or 'fixed', got 'dilated'"),
        ("faiss", {"block": 0}, "faiss: block must be an integer >= 1, got 0"),
        ("faiss", {"nprobe": 0}, "faiss: nprobe must be an integer >= 1, got 0"),
        ("faiss", {"ef_search": 1.5}, "faiss: ef_search must be an integer >= 1, got 1.5"),
        ("faiss", {"train_size": True}, "faiss: train_size must be an integer >= 1, got True"),
    ],
    ids=str,
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(name, **options)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("self", "none"),
        ("topk", "none"),
        ("window", "size"),
        ("global", "indices, tokens"),
        ("random", "links, per_head"),
        ("strided", "count, pattern, stride"),
        ("edges", "csr, edge_index"),
        ("faiss", "block, ef_search, index, nprobe, train_size"),
    ],
)
def test_unknown_options_list_the_known_ones(name: str, known: str) -> None:
    with pytest.raises(UnknownOptionError, match=f"source '{name}' has no option 'sise'; its options: {known}$"):
        source(name, sise=3)


@pytest.mark.parametrize("name", ["self", "window", "strided"])
def test_sources_that_compare_positions_sit_out_cross_attention(name: str) -> None:
    inputs = make_inputs(queries=17, keys=63, cross=True)
    with pytest.raises(ConfigError, match=f"none of the sources {name} works across two sequences"):
        route(inputs, {name: {}})
    both = edges_of(inputs, {name: {}, "random": {}})
    assert torch.equal(both, edges_of(inputs, {"random": {}}))
