"""Quality, memory and time: exact values on graphs made by hand, and a naive implementation beside every mask."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssa_framework import NeighborGraph, SSAConfig, build_graph, sparse_attention
from ssa_framework.errors import ConfigError, GraphError, ShapeError
from ssa_framework.quality import (
    QualityReport,
    Timing,
    measure,
    output_difference,
    peak_memory,
    time_alternating,
)
from ssa_framework.quality import rows as rows_module
from ssa_framework.quality.sample import sample_rows

WINDOW_AND_TOPK = {"self": {}, "window": {"size": 2}, "global": {"tokens": 1}, "topk": {}}


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


# -- values by hand ----------------------------------------------------------------------------------------------

# One query whose four keys have the weights 1/15, 2/15, 4/15, 8/15, and one-hot values, so that the output is the
# weights.
QUERY = torch.ones((1, 1, 1, 1), dtype=torch.float64)
KEY = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).log().view(1, 1, 4, 1)
VALUE = torch.eye(4, dtype=torch.float64).view(1, 1, 4, 4)


def by_hand(neighbors: list[int], **options: Any) -> QualityReport:
    graph = NeighborGraph.from_lists(torch.tensor(neighbors).view(1, 1, 1, -1), num_keys=4)
    return measure(QUERY, KEY, VALUE, graph, scale=1.0, **options)


def test_values_by_hand() -> None:
    report = by_hand([0, 3], recall_at=2)
    assert report.queries == 1
    assert report.recall == 0.5  # of the keys 3 and 2
    assert report.recall_beyond == 0.5  # no band, no columns
    assert report.attention_mass == pytest.approx(9 / 15, abs=1e-12)
    difference = math.dist([1 / 9, 0, 0, 8 / 9], [1 / 15, 2 / 15, 4 / 15, 8 / 15])
    error = difference / math.hypot(1 / 15, 2 / 15, 4 / 15, 8 / 15)
    assert report.output_error == pytest.approx(error, abs=1e-12)
    assert report.output_error_p95 == pytest.approx(error, abs=1e-12)
    assert report.output_error_total == pytest.approx(error, abs=1e-12)
    assert (report.degree, report.allowed, report.candidates) == (2.0, 4.0, 2.0)
    assert report.lift == pytest.approx(1.0)  # two of four keys, and half of the best two
    assert report.share_scored == 0.0


@pytest.mark.parametrize(("recall_at", "recall"), [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5), (100, 0.5)])
def test_recall_at(recall_at: int, recall: float) -> None:
    assert by_hand([0, 3], recall_at=recall_at).recall == pytest.approx(recall)


def test_keys_that_tie_for_the_last_place_are_interchangeable() -> None:
    key = torch.zeros((1, 1, 4, 1), dtype=torch.float64)
    key[..., 0, 0] = 1.0
    for neighbors in ([0, 1], [0, 3], [0, 2]):
        graph = NeighborGraph.from_lists(torch.tensor(neighbors).view(1, 1, 1, -1), num_keys=4)
        assert measure(QUERY, key, VALUE, graph, recall_at=2).recall == 1.0
    graph = NeighborGraph.from_lists(torch.tensor([1, 2, 3]).view(1, 1, 1, -1), num_keys=4)
    assert measure(QUERY, key, VALUE, graph, recall_at=2).recall == 0.5  # key 0 is not interchangeable


def test_recall_beyond_leaves_out_band_and_columns() -> None:
    q, k, v = tensors(1, 1, 1, 12, 12)
    config = SSAConfig(num_neighbors=8, sources={"window": {"size": 1}, "global": {"tokens": 1}})
    graph = build_graph(q, k, config=config, is_causal=True)
    report = measure(q, k, v, graph, recall_at=3)
    assert report.recall_beyond == 0.0
    assert report.recall > 0.0
    for row in (0, 1):  # these queries have no key outside the window and column 0
        assert int(graph.degree()[0, 0, row]) == row + 1
    config = SSAConfig(num_neighbors=3 + 3, sources=WINDOW_AND_TOPK | {"window": {"size": 1}})
    exact = build_graph(q, k, config=config, is_causal=True)
    assert measure(q, k, v, exact, recall_at=3).recall_beyond == 1.0


def test_recall_beyond_is_none_where_nothing_is_beyond() -> None:
    q, k, v = tensors(1, 1, 1, 5, 5)
    graph = build_graph(q, k, config=SSAConfig(sources={"window": {"size": 9}}))
    report = measure(q, k, v, graph)
    assert report.recall_beyond is None
    assert json.loads(json.dumps(report.to_dict()))["recall_beyond"] is None


def test_percentiles() -> None:
    """Of 20 queries, 19 have their key as a neighbor and one has none."""
    q, k, v = tensors(1, 1, 1, 20, 20)
    neighbors = torch.arange(20).view(1, 1, 20, 1).clone()
    neighbors[0, 0, 7] = -1
    graph = NeighborGraph.from_lists(neighbors, num_keys=20)
    segments = torch.arange(20)[None]
    alone = build_graph(q, k, config=SSAConfig(sources={"self": {}}), segment_ids=segments)
    graph = NeighborGraph.from_lists(neighbors, num_keys=20, segment_ids=segments)
    report = measure(q, k, v, graph)
    assert report.recall == report.attention_mass == pytest.approx(0.95)
    assert report.recall_p5 == pytest.approx(0.95)  # between the worst (0) and the second (1), at 0.95 of the way
    assert report.output_error == pytest.approx(0.05)
    assert report.output_error_p95 == pytest.approx(0.05)
    assert measure(q, k, v, alone).recall_p5 == 1.0


# -- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_graph_of_every_key_loses_nothing(causal: bool, kv_heads: int) -> None:
    q, k, v = tensors(2, 4, kv_heads, 33, 33)
    graph = build_graph(q, k, config=SSAConfig(sources={"window": {"size": 40}}), is_causal=causal)
    report = measure(q, k, v, graph, recall_at=8)
    assert report.recall == report.recall_p5 == 1.0
    assert report.attention_mass == pytest.approx(1.0, abs=1e-12)
    assert report.output_error <= 1e-12
    assert report.output_error_p95 <= 1e-12
    assert report.output_error_total <= 1e-12
    assert report.degree == report.allowed == report.candidates == (17.0 if causal else 33.0)
    assert report.lift == 1.0


def test_graph_without_edges_loses_everything() -> None:
    q, k, v = tensors(2, 4, 2, 9, 9)
    graph = NeighborGraph.from_lists(torch.full((2, 4, 9, 3), -1), num_keys=9)
    report = measure(q, k, v, graph)
    assert report.recall == report.attention_mass == report.degree == report.candidates == 0.0
    assert report.output_error == report.output_error_total == pytest.approx(1.0)
    assert report.lift == 1.0  # nothing considered, nothing found: neither better nor worse than chance


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (1, 0, 3), (1, 3, 0)])
def test_nothing_to_measure(batch: int, queries: int, keys: int) -> None:
    q, k, v = tensors(batch, 2, 2, queries, keys)
    graph = build_graph(q, k, config=SSAConfig(sources={"topk": {}}))
    report = measure(q, k, v, graph)
    assert report.queries == 0
    assert (report.recall, report.attention_mass, report.output_error, report.output_error_total) == (1, 1, 0, 0)
    assert report.recall_beyond is None
    assert report.recall_per_head.shape == (batch, 2)
    json.dumps(report.to_dict(), allow_nan=False)


def test_queries_that_may_attend_nothing_are_left_out() -> None:
    q, k, v = tensors(1, 2, 2, 6, 6)
    mask = torch.ones((6, 6), dtype=torch.bool)
    mask[2] = False
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=6, sources={"topk": {}}), attn_mask=mask)
    report = measure(q, k, v, graph)
    assert report.queries == 2 * 5
    assert report.recall == 1.0
    assert report.output_error <= 1e-12
    assert report.allowed == 6.0


# -- every kind of mask against a naive implementation -----------------------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph, bias: Tensor, recall_at: int) -> dict[str, float]:
    """Everything one query at a time; ``bias [B, H, N, M]`` is -inf where attention is not allowed."""
    group = q.shape[1] // k.shape[1]
    edges = graph.to_dense_mask()
    fixed = torch.zeros_like(edges)
    keys = torch.arange(k.shape[2])
    found: dict[str, list[float]] = {"recall": [], "beyond": [], "mass": [], "error": []}
    for b, h, n in ((b, h, n) for b in range(len(q)) for h in range(q.shape[1]) for n in range(q.shape[2])):
        scores = k[b, h // group] @ q[b, h, n] / math.sqrt(q.shape[-1]) + bias[b, h, n]
        allowed = scores > -math.inf
        if not allowed.any():
            continue
        position = int(graph.mask.positions.expand(len(q), -1)[b, n])
        if graph.band is not None:
            fixed[b, h, n] = (keys >= position - graph.band.before) & (keys <= position + graph.band.after)
        if graph.columns is not None:
            fixed[b, h, n] |= torch.isin(keys, graph.columns)
        values = v[b, h // group]
        mine = edges[b, h, n]
        weights = scores.softmax(0)
        kept = scores.masked_fill(~mine, -math.inf).softmax(0) if mine.any() else torch.zeros_like(scores)
        for name, members in (("recall", allowed), ("beyond", allowed & ~fixed[b, h, n])):
            wanted = min(recall_at, int(members.sum()))
            if wanted:
                best = scores.masked_fill(~members, -math.inf).topk(wanted).indices
                found[name].append(float(mine[best].double().mean()))
        found["mass"].append(float(weights[mine].sum()))
        found["error"].append(float((kept @ values - weights @ values).norm() / (weights @ values).norm()))
    return {name: sum(x) / len(x) for name, x in found.items()} | {"queries": len(found["mass"])}


def no_third_key(b: Tensor, h: Tensor, i: Tensor, m: Tensor) -> Tensor:
    return ((m + h) % 3 != 0) | (i == m)


GENERATOR = torch.Generator().manual_seed(1)
PADDING = torch.ones((2, 21), dtype=torch.bool)
PADDING[1, 13:] = False
SEGMENTS = torch.tensor([[0] * 8 + [1] * 13, [3] * 20 + [4]])
ADDITIVE = torch.randn((2, 1, 21, 21), generator=GENERATOR, dtype=torch.float64)
ADDITIVE[:, :, :, 5] = -math.inf
PER_HEAD = torch.rand((1, 4, 21, 21), generator=GENERATOR) < 0.6
MASKS: dict[str, dict[str, Any]] = {
    "free": {},
    "causal": {"is_causal": True},
    "padded": {"key_padding_mask": PADDING},
    "packed causal": {"segment_ids": SEGMENTS, "is_causal": True},
    "additive": {"attn_mask": ADDITIVE},
    "bool per head": {"attn_mask": PER_HEAD},
    "mask_mod": {"mask_mod": no_third_key},
    "positions": {"query_positions": torch.arange(21).flip(0), "is_causal": True},
}


def dense_bias(options: dict[str, Any]) -> Tensor:
    """What the masks mean, ``[2, 4, 21, 21]``."""
    bias = torch.zeros((2, 4, 21, 21), dtype=torch.float64)
    rows, keys = torch.arange(21)[:, None], torch.arange(21)[None]
    if options.get("is_causal"):
        bias = bias.masked_fill(keys > options.get("query_positions", torch.arange(21))[:, None], -math.inf)
    if "key_padding_mask" in options:
        bias = bias.masked_fill(~options["key_padding_mask"][:, None, None, :], -math.inf)
    if "segment_ids" in options:
        ids = options["segment_ids"]
        bias = bias.masked_fill((ids[:, :, None] != ids[:, None, :])[:, None], -math.inf)
    if "attn_mask" in options:
        mask = options["attn_mask"]
        bias = bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, -math.inf)
    if "mask_mod" in options:
        heads = torch.arange(4)[:, None, None]
        bias = bias.masked_fill(~options["mask_mod"](torch.zeros(()), heads, rows, keys), -math.inf)
    return bias


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_against_the_naive_implementation(kind: str, graph_heads: str) -> None:
    q, k, v = tensors(2, 4, 2, 21, 21)
    config = SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK, graph_heads=graph_heads)
    graph = build_graph(q, k, config=config, **MASKS[kind])
    expected = naive(q, k, v, graph, dense_bias(MASKS[kind]), recall_at=5)
    report = measure(q, k, v, graph, recall_at=5)
    assert report.queries == expected["queries"]
    assert report.recall == pytest.approx(expected["recall"], abs=1e-12)
    assert report.recall_beyond == pytest.approx(expected["beyond"], abs=1e-12)
    assert report.attention_mass == pytest.approx(expected["mass"], abs=1e-10)
    assert report.output_error == pytest.approx(expected["error"], abs=1e-10)
    for name in ("recall", "attention_mass", "output_error"):
        per_head = getattr(report, f"{name}_per_head")
        assert per_head.shape == (2, 4)
        if kind != "positions":  # there every row counts equally often in every head
            continue
        assert float(per_head.mean()) == pytest.approx(getattr(report, name))


@pytest.mark.parametrize("kind", MASKS)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(2, 4, 2, 21, 21)
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK), **MASKS[kind])
    whole = measure(q, k, v, graph, recall_at=5).to_dict()
    monkeypatch.setattr(rows_module, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(rows_module, "_GATHERED_ELEMENTS", 1)
    pieces = measure(q, k, v, graph, recall_at=5).to_dict()
    assert list(pieces) == list(whole)
    for name, value in whole.items():
        if isinstance(value, dict):
            assert pieces[name] == value
        else:
            assert torch.as_tensor(pieces[name]).allclose(torch.as_tensor(value), rtol=1e-9, atol=1e-12), name


def test_padded_keys_may_hold_anything() -> None:
    q, k, v = tensors(2, 4, 2, 21, 21)
    config = SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK)
    clean = measure(q, k, v, build_graph(q, k, config=config, key_padding_mask=PADDING)).to_dict()
    k[1, :, 13:], v[1, :, 13:] = math.nan, math.inf
    assert measure(q, k, v, build_graph(q, k, config=config, key_padding_mask=PADDING)).to_dict() == clean


# -- sources, scored keys and lift -------------------------------------------------------------------------------


def test_keys_scored_slots_and_lift() -> None:
    q, k, v = tensors(1, 2, 2, 64, 64)
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=16, sources=WINDOW_AND_TOPK), is_causal=True)
    report = measure(q, k, v, graph, recall_at=8)
    assert report.keys_scored == graph.keys_scored()
    assert report.slots == graph.slots_by_source()
    assert report.allowed == 32.5
    assert report.share_scored == pytest.approx(report.keys_scored["topk"] / 32.5)
    fixed = sum(report.slots[name] for name in ("self", "window", "global"))
    assert report.candidates == pytest.approx(report.keys_scored["topk"] + fixed)
    assert report.candidates == pytest.approx(32.5)  # an exact search considers every key,
    assert report.lift == pytest.approx(report.recall)  # so its lift can't exceed 1
    assert sum(report.slots.values()) == pytest.approx(report.degree)


def test_slots_of_unscored_patterns_are_candidates() -> None:
    q, k, v = tensors(1, 1, 1, 16, 16)
    edges = torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=4, sources={"edges": {"edge_index": edges}}))
    report = measure(q, k, v, graph, recall_at=16)
    assert report.keys_scored == {"edges": 0.0}
    assert report.candidates == report.degree == 1.0
    assert report.recall == pytest.approx(1 / 16)
    assert report.lift == pytest.approx(1.0)


# -- sampling ----------------------------------------------------------------------------------------------------


def test_sample_rows() -> None:
    cpu = torch.device("cpu")
    assert sample_rows(7, 7, 0, cpu).tolist() == sample_rows(7, 100, 0, cpu).tolist() == list(range(7))
    rows = sample_rows(1000, 100, 3, cpu)
    assert (rows // 10).tolist() == list(range(100))  # one of each stretch of ten
    assert rows.tolist() == sample_rows(1000, 100, 3, cpu).tolist()
    assert rows.tolist() != sample_rows(1000, 100, 4, cpu).tolist()
    uneven = sample_rows(1001, 64, 0, cpu)
    assert bool((uneven.diff() > 0).all())
    assert 0 <= int(uneven[0]) < int(uneven[-1]) < 1001


@pytest.mark.parametrize("kind", ["causal", "packed causal", "additive", "bool per head", "mask_mod", "positions"])
def test_sample_is_the_mean_over_its_rows(kind: str) -> None:
    q, k, v = tensors(2, 4, 2, 21, 21)
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK), **MASKS[kind])
    rows = sample_rows(21, 6, 0, torch.device("cpu"))
    bias = dense_bias(MASKS[kind])
    left_out = torch.ones(21, dtype=torch.bool)
    left_out[rows] = False
    bias[:, :, left_out] = -math.inf
    expected = naive(q, k, v, graph, bias, recall_at=5)
    report = measure(q, k, v, graph, recall_at=5, sample=6)
    assert report.queries == expected["queries"]
    assert report.recall == pytest.approx(expected["recall"], abs=1e-12)
    assert report.attention_mass == pytest.approx(expected["mass"], abs=1e-10)


def test_sample_of_all_queries_is_everything() -> None:
    q, k, v = tensors(1, 2, 2, 30, 30)
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK))
    everything = measure(q, k, v, graph, sample=30).to_dict()
    assert measure(q, k, v, graph, sample=10**6, seed=5).to_dict() == everything
    assert everything["queries"] == 60


def test_memory_does_not_grow_with_queries_times_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 1, 16384, 8), generator=generator) for _ in range(3))
    graph = build_graph(q, k, config=SSAConfig(num_neighbors=64, sources={"window": {"size": 8}}), is_causal=True)
    reports = []
    held = peak_memory(lambda: reports.append(measure(q, k, v, graph, sample=300)))
    assert reports[0].queries == 300
    assert held < 300 * 2**20  # all scores would take 1024 MiB, before anything is made of them


# -- bad input ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = tensors(1, 2, 2, 8, 8)
    graph = build_graph(q, k, config=SSAConfig(sources={"topk": {}}))
    with pytest.raises(GraphError, match=r"num_queries = 8, tensors have 7"):
        measure(q[:, :, :7], k, v, graph)
    with pytest.raises(GraphError, match=r"num_keys = 8, tensors have 7"):
        measure(q, k[:, :, :7], v[:, :, :7], graph)
    with pytest.raises(ShapeError, match=r"query must have shape"):
        measure(q[0], k, v, graph)
    with pytest.raises(ShapeError, match="key and value must agree"):
        measure(q, k, v[:, :, :7], graph)
    for options in ({"recall_at": 0}, {"sample": 0}, {"sample": True}, {"recall_at": 1.5}):
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name} must be an integer >= 1"):
            measure(q, k, v, graph, **options)


# -- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_output_difference_of_a_right_and_a_wrong_output(kind: str) -> None:
    q, k, v = (x.float() for x in tensors(2, 4, 2, 21, 21))
    config = SSAConfig(num_neighbors=12, sources=WINDOW_AND_TOPK)
    graph = build_graph(q, k, config=config, **MASKS[kind])
    out = sparse_attention(q, k, v, graph=graph, enable_gqa=True, config=config)
    assert output_difference(q, k, v, graph, out, sample=7) < 2e-6
    rows = sample_rows(21, 7, 0, torch.device("cpu"))
    out[0, 1, rows[3], 2] += 0.01 * v.abs().max()
    assert output_difference(q, k, v, graph, out, sample=7) == pytest.approx(0.01, rel=1e-3)
    out[0, 1, rows[3], 2] = math.nan
    assert output_difference(q, k, v, graph, out, sample=7) == math.inf
    with pytest.raises(ShapeError, match=r"output must have shape \[2, 4, 21, 8\]"):
        output_difference(q, k, v, graph, out[..., :7])


def test_output_difference_of_nothing() -> None:
    q, k, v = tensors(1, 2, 2, 0, 3)
    graph = build_graph(q, k, config=SSAConfig(sources={"topk": {}}))
    assert output_difference(q, k, v, graph, torch.empty((1, 2, 0, 8))) == 0.0


# -- memory ------------------------------------------------------------------------------------------------------

MIB = 2**20
PYTHON_OBJECTS = 64 * 2**10  # what the calls of the tests take besides, at most


def megabytes(count: int) -> Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def together() -> None:
    first, second = megabytes(3), megabytes(5)
    del first, second


def one_after_the_other() -> None:
    for _ in range(10):
        megabytes(4)


def released_before_the_peak() -> Tensor:
    first = megabytes(6)
    del first
    second = megabytes(2)
    return torch.cat([second, second])  # 2 + 4 beats neither 6 nor adds to it


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: None, 0),
        (lambda: megabytes(7), 7),
        (together, 8),
        (one_after_the_other, 4),
        (released_before_the_peak, 6),
    ],
    ids=["nothing", "result", "together", "in turn", "released"],
)
def test_peak_memory_is_exact_but_for_python_objects(fn: Callable[[], object], expected: int) -> None:
    assert 0 <= peak_memory(fn) - expected * MIB < PYTHON_OBJECTS


def test_peak_memory_sees_numpy_arrays_and_tensors_together() -> None:
    held = peak_memory(lambda: (np.ones(3 * MIB, dtype=np.uint8), megabytes(2)))
    assert 0 <= held - 5 * MIB < PYTHON_OBJECTS


def test_peak_memory_counts_what_the_call_allocates() -> None:
    held = [megabytes(32)]

    def release_and_allocate() -> None:
        held.clear()
        held.append(megabytes(8))

    # not minus the 32 that somebody else had paid for
    assert 0 <= peak_memory(release_and_allocate) - 8 * MIB < PYTHON_OBJECTS
    assert 0 <= peak_memory(lambda: held.append(megabytes(2))) - 2 * MIB < PYTHON_OBJECTS


def test_peak_memory_sees_the_backward_pass() -> None:
    x = torch.ones(MIB, requires_grad=True)
    held = peak_memory(lambda: x.exp().sum().backward())
    assert 8 * MIB <= held < 9 * MIB  # the exponentials, which backward needs, and the gradient, float32


def test_peak_memory_is_silent(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_memory(lambda: megabytes(1))
    assert capfd.readouterr() == ("", "")


# -- time --------------------------------------------------------------------------------------------------------


def test_contestants_take_turns() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            time.sleep(0.006)  # long enough to be called once per reading

        return run

    seen: list[str] = []
    timings = time_alternating(
        {"a": contestant("a"), "b": contestant("b")}, seconds=0.0, min_rounds=4, max_rounds=9, on_call=seen.append
    )
    assert seen == ["a", "b"] * 4
    assert calls == ["a", "b"] * 5  # once to warm up, then in turn
    for timing in timings.values():
        assert len(timing.readings) == 4
        assert min(timing.readings) >= 0.006


def test_rounds_go_on_for_the_time_given() -> None:
    timings = time_alternating({"sum": lambda: torch.ones(1000).sum()}, seconds=60.0, min_rounds=1, max_rounds=3)
    assert len(timings["sum"].readings) == 3
    assert 0.0 < timings["sum"].median < 0.01  # per call, though many calls make a reading


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    seen: set[int] = set()
    time_alternating({"look": lambda: seen.add(torch.get_num_threads())}, seconds=0.0, threads=before + 1)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "options",
    [{"contestants": {}}, {"min_rounds": 0}, {"min_rounds": 3, "max_rounds": 2}, {"threads": 0}],
    ids=["nobody", "no round", "max below min", "no thread"],
)
def test_time_alternating_refuses(options: dict[str, Any]) -> None:
    arguments = {"contestants": {"a": lambda: None}} | options
    with pytest.raises(ConfigError, match="time_alternating needs"):
        time_alternating(**arguments)


def test_timing_statistics() -> None:
    timing = Timing((4.0, 1.0, 3.0, 2.0, 5.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert (timing + Timing((1.0,) * 5)).readings == (5.0, 2.0, 4.0, 3.0, 6.0)
    assert timing.to_dict() == {
        "median_s": 3.0,
        "lower_quartile_s": 2.0,
        "upper_quartile_s": 4.0,
        "rounds": 5,
    }
