"""`NeighborGraph`: its views agree with each other, and its invariants are really checked."""

from dataclasses import replace

import pytest
import torch

from ssa_framework import NeighborGraph, SSAConfig, build_graph
from ssa_framework.errors import DtypeError, GraphError
from ssa_framework.proposals import Band

MIX = {"self": {}, "window": {"size": 2}, "global": {"indices": [0, 9]}, "topk": {}}


def make(causal: bool = True, heads: int = 4, kv_heads: int = 2, length: int = 33, **options: object) -> NeighborGraph:
    q, k = torch.randn(2, heads, length, 8), torch.randn(2, kv_heads, length, 8)
    config = SSAConfig(sources=MIX, num_neighbors=12, graph_heads=options.pop("graph_heads", "query"))
    return build_graph(q, k, config=config, is_causal=causal, **options)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_views_agree(causal: bool, graph_heads: str) -> None:
    keep = torch.rand(2, 33) > 0.2
    graph = make(causal, graph_heads=graph_heads, key_padding_mask=keep)
    dense = graph.to_dense_mask()
    per_graph_head = dense[:, :: 4 // graph.graph_heads]
    assert dense.shape == (2, 4, 33, 33)
    assert torch.equal(graph.degree(), per_graph_head.sum(-1))
    neighbors, valid = graph.as_lists()
    assert neighbors.dtype == torch.int32
    assert torch.equal(valid, neighbors >= 0)
    rebuilt = torch.zeros(2, graph.graph_heads, 33, 34, dtype=torch.bool)
    rebuilt.scatter_(-1, torch.where(valid, neighbors, 33).long(), True)
    assert torch.equal(rebuilt[..., :33], per_graph_head)
    indptr, indices = graph.to_csr()
    rows, columns = per_graph_head.flatten(0, 2).nonzero(as_tuple=True)
    assert torch.equal(indices.long(), columns)
    assert torch.equal(indptr[1:] - indptr[:-1], torch.bincount(rows, minlength=indptr.numel() - 1))
    assert graph.padding_fraction == pytest.approx(
        1 - per_graph_head.sum().item() / (2 * graph.graph_heads * 33 * graph.slots)
    )


def test_sources_share_the_edges_among_them() -> None:
    graph = make(causal=False)
    slots = graph.slots_by_source()
    assert list(slots) == ["self", "window", "global", "topk"]
    assert slots["self"] == 1.0
    assert slots["window"] == pytest.approx((33 * 4 - 6) / 33)
    assert sum(slots.values()) == pytest.approx(graph.degree().double().mean().item())


def test_slots_count_guaranteed_once_where_patterns_overlap() -> None:
    q = torch.randn(1, 1, 10, 4)
    mix = {"global": {"indices": [4]}, "window": {"size": 1}, "self": {}}
    slots = build_graph(q, q, config=SSAConfig(sources=mix, num_neighbors=8)).slots_by_source()
    assert slots == {"global": 0.7, "window": 2.8, "self": 0.0}


def test_overlap_laws() -> None:
    a, b = make(), make()
    assert torch.equal(a.overlap(a), torch.ones(2, 4, 33))
    assert torch.equal(a.overlap(b), b.overlap(a))
    x, y = a.to_dense_mask(), b.to_dense_mask()
    torch.testing.assert_close(a.overlap(b), (x & y).sum(-1) / (x | y).sum(-1))
    with pytest.raises(GraphError, match="one shape"):
        a.overlap(make(length=32))


def test_from_lists_cleans_what_it_gets() -> None:
    neighbors = torch.tensor([[[[2, 0, 2, -1], [1, 3, 0, 0]]]])
    graph = NeighborGraph.from_lists(neighbors, num_keys=4, num_heads=2, causal=True)
    graph.validate()
    assert graph.neighbors.tolist() == [[[[0, -1, -1, -1], [0, 1, -1, -1]]]]
    assert graph.to_dense_mask()[0, 1].tolist() == [[True, False, False, False], [True, True, False, False]]
    valid = torch.tensor([[[[True, False, False, False], [False, True, False, False]]]])
    assert NeighborGraph.from_lists(neighbors, num_keys=4, valid=valid).degree().tolist() == [[[1, 1]]]


def test_from_lists_rejects_what_it_cannot_read() -> None:
    with pytest.raises(GraphError, match=r"lie in \[0, 4\)"):
        NeighborGraph.from_lists(torch.full((1, 1, 2, 1), 4), num_keys=4)
    with pytest.raises(GraphError, match="shape"):
        NeighborGraph.from_lists(torch.zeros(2, 1, dtype=torch.long), num_keys=4)
    with pytest.raises(DtypeError, match="int32"):
        NeighborGraph.from_lists(torch.zeros(1, 1, 2, 1), num_keys=4)
    with pytest.raises(GraphError, match="broadcast"):
        NeighborGraph.from_lists(torch.zeros(1, 3, 2, 1, dtype=torch.long), num_keys=4, num_heads=4)


def broken(graph: NeighborGraph, what: str) -> NeighborGraph:
    lists = graph.neighbors.clone()
    if what == "repeated key":
        lists[0, 0, 20, 1] = lists[0, 0, 20, 0]
    elif what == "future key":
        lists[0, 0, 5] = -1
        lists[0, 0, 5, 0] = 8
    elif what == "covered key":
        lists[0, 0, 20] = -1
        lists[0, 0, 20, 0] = 19
    elif what == "column key":
        lists[0, 0, 20] = -1
        lists[0, 0, 20, 0] = 0
    elif what == "hole":
        lists[0, 0, 30, 0] = -1
    elif what == "out of range":
        lists[0, 0, 30, -1] = 33
    elif what == "dtype":
        lists = lists.long()
    elif what == "shape":
        lists = lists[:, :, :10]
    elif what == "band":
        return replace(graph, band=Band(2, 1))
    elif what == "columns":
        return replace(graph, columns=torch.tensor([9, 0], dtype=torch.int32))
    return replace(graph, neighbors=lists)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("repeated key", "unique"),
        ("future key", "mask forbids"),
        ("covered key", "already covers"),
        ("column key", "already covers"),
        ("hole", "empty only at the end"),
        ("out of range", "lie in"),
        ("dtype", "int32"),
        ("shape", "shape"),
        ("band", "causal band"),
        ("columns", "ascending"),
    ],
)
def test_validate_finds(what: str, message: str) -> None:
    graph = make(causal=True)
    graph.validate()
    with pytest.raises(GraphError, match=message):
        broken(graph, what).validate()


def test_dense_mask_has_a_limit() -> None:
    graph = NeighborGraph.from_lists(torch.zeros(1, 1, 2**16, 1, dtype=torch.int32), num_keys=2**16)
    with pytest.raises(GraphError, match="too large"):
        graph.to_dense_mask()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences_have_empty_graphs(queries: int, keys: int) -> None:
    q, k = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4)
    graph = build_graph(q, k, config=SSAConfig(sources=MIX, num_neighbors=12), is_causal=True)
    graph.validate()
    assert graph.degree().sum() == 0
    assert graph.to_dense_mask().shape == (1, 2, queries, keys)
    assert graph.slots_by_source() == dict.fromkeys(graph.sources, 0.0)
