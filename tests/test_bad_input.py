"""Bad input gets an error of the project that says what was expected, what came and what would work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssa_framework import SourceRegistry, SparseAttention, SSAConfig, SSAError, build_graph, errors, sparse_attention
from ssa_framework.errors import (
    BackendUnavailableError,
    BudgetWarning,
    ConfigError,
    DtypeError,
    GraphError,
    MaskError,
    ProposalError,
    ShapeError,
    UnknownOptionError,
    UnknownSourceError,
)
from ssa_framework.ops.index_bounds import any_outside
from ssa_framework.plugin import Band, Candidates, Columns, NeighborSource, Proposal, Ranges, Spans
from ssa_framework.proposals import Bounds, validate_proposals

Q = torch.randn(2, 4, 9, 8)
KV = torch.randn(2, 2, 9, 8)
SMALL = {"self": {}, "global": {}}


def test_every_error_is_also_what_users_expect() -> None:
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, SSAError) and error is not SSAError:
            # RuntimeError is what torch raises for checkpoints and process groups
            assert issubclass(error, (ValueError, TypeError, ImportError, RuntimeError)), error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 10, "num_heads": 4}, r"d_model \(10\) must be divisible by num_heads \(4\)"),
        ({"num_heads": 8, "num_kv_heads": 3}, r"num_heads \(8\) must be a multiple of num_kv_heads \(3\)"),
        ({"num_neighbors": 0}, "num_neighbors must be an integer >= 1, got 0"),
        ({"window_size": -1}, "window_size must be an integer >= 0, got -1"),
        ({"max_num_hashes": 13}, r"max_num_hashes must be an integer in \[1, 12\], got 13"),
        ({"num_hash_rounds": 2.0}, "num_hash_rounds must be an integer"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"graph_heads": "all"}, "graph_heads must be 'query' or 'kv'"),
        ({"dense_below": -5}, "dense_below must be an integer >= 0"),
        ({"rope_base": 0.5}, "rope_base must be greater than 1"),
        ({"d_model": 9, "num_heads": 3, "rope_base": 10.0}, "even head dim"),
        ({"global_token_indices": [3, -1]}, "global_token_indices must be an integer >= 0, got -1"),
        ({"sources": {}}, "non-empty mapping"),
        ({"sources": {"lsh": 3}}, "must map option names to values, got 3"),
        ({"sources": {"self": {}}, "window_size": 4}, "window_size=4 has no effect beside sources"),
    ],
)
def test_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SSAConfig(**fields)


def test_configuration_from_json() -> None:
    config = SSAConfig(sources={"window": {"size": 3}, "lsh": {"rounds": 2}}, causal=True)
    assert SSAConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="unknown configuration field 'heads'; known: d_model"):
        SSAConfig.from_json('{"heads": 3}')
    with pytest.raises(ConfigError, match="not a JSON configuration"):
        SSAConfig.from_json("{")
    with pytest.raises(ConfigError, match="only JSON values"):
        SSAConfig(sources={"edges": {"edge_index": torch.zeros(2, 1)}}).to_json()


def test_configuration_from_file(tmp_path) -> None:
    config = SSAConfig(d_model=64, num_heads=2)
    config.to_json(tmp_path / "config.json")
    assert SSAConfig.from_json(tmp_path / "config.json") == config


def test_unknown_source_and_option() -> None:
    with pytest.raises(UnknownSourceError, match=r"unknown source 'lhs'; registered: blocks, clusters, (\w+, )*lsh, "):
        SparseAttention(SSAConfig(sources={"lhs": {}}))
    with pytest.raises(UnknownOptionError, match="source 'window' has no option 'width'; its options: size"):
        SparseAttention(SSAConfig(sources={"window": {"width": 3}}))
    with pytest.raises(UnknownOptionError, match="source 'self' has no option 'x'; its options: none"):
        SparseAttention(SSAConfig(sources={"self": {"x": 1}}))


def test_unknown_backend() -> None:
    with pytest.raises(BackendUnavailableError, match="'cuda' is not available; available"):
        SparseAttention(SSAConfig(backend="cuda"))
    with pytest.raises(BackendUnavailableError, match="'cuda' is not available; available"):
        sparse_attention(Q, KV, KV, enable_gqa=True, config=SSAConfig(backend="cuda"))


def test_grouped_queries_must_be_asked_for() -> None:
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        sparse_attention(Q, KV, KV)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"attn_mask": torch.ones(3, 9, dtype=torch.bool)}, MaskError, r"shape \[3, 9\] fits nothing; accepted"),
        ({"attn_mask": torch.ones(2, 3, 9, 9, dtype=torch.bool)}, MaskError, "fits nothing"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.long)}, DtypeError, "bool .True = attend. or floating point"),
        ({"attn_mask": [[True]]}, MaskError, "must be a tensor, got list"),
        ({"key_padding_mask": torch.ones(2, 8, dtype=torch.bool)}, MaskError, r"\[B, M\] = \[2, 9\], got \[2, 8\]"),
        ({"key_padding_mask": torch.ones(2, 9)}, DtypeError, "must be bool"),
        ({"segment_ids": torch.zeros(2, 8, dtype=torch.long)}, MaskError, r"\[B, 9\] = \[2, 9\]"),
        ({"segment_ids": torch.zeros(2, 9)}, DtypeError, "must be integers"),
        ({"segment_ids": (torch.zeros(9).long(),)}, MaskError, "pair"),
        ({"mask_mod": "causal"}, MaskError, "must be a function"),
        ({"mask_mod": lambda b, h, i, j: i - j}, MaskError, "must return a bool tensor, got torch.int64"),
        ({"query_positions": torch.zeros(8).long()}, ShapeError, r"\[N\] = \[9\]"),
        ({"query_positions": torch.full((9,), -1)}, ShapeError, "must be >= 0"),
        ({"query_positions": torch.zeros(9)}, DtypeError, "must be integers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_masks(masks: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_graph(Q, KV, config=SSAConfig(sources=SMALL), **masks)


def test_a_mask_that_could_be_read_in_two_ways() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, sources=SMALL))
    x, mask = torch.randn(5, 5, 16), torch.ones(5, 5, dtype=torch.bool).tril()
    with pytest.raises(MaskError, match=r"could be \[B, M\] or \[N, M\]"):
        layer(x, attention_mask=mask)
    per_query = layer(x, attention_mask=mask[None, None])[0]
    per_batch = layer(x, attention_mask=mask[:, None, None])[0]
    assert not torch.equal(per_query, per_batch)


def test_layer_inputs() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, sources=SMALL))
    with pytest.raises(ShapeError, match=r"\[batch, length, 16\], got \[5, 16\]"):
        layer(torch.randn(5, 16))
    with pytest.raises(ShapeError, match="key_value must have shape"):
        layer(torch.randn(1, 5, 16), torch.randn(1, 5, 8))
    with pytest.raises(ShapeError, match="batch sizes differ"):
        layer(torch.randn(1, 5, 16), torch.randn(2, 5, 16))


def test_cross_attention_needs_a_source_that_works_there() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, sources={"self": {}, "window": {}}))
    with pytest.raises(ConfigError, match="compare positions"):
        layer(torch.randn(1, 5, 16), torch.randn(1, 7, 16))


def test_graph_and_masks_do_not_mix() -> None:
    graph = build_graph(Q, KV, config=SSAConfig(sources=SMALL))
    with pytest.raises(MaskError, match="attn_mask belong"):
        sparse_attention(Q, KV, KV, torch.ones(9, 9, dtype=torch.bool), enable_gqa=True, graph=graph)
    with pytest.raises(GraphError, match="built without it"):
        sparse_attention(Q, KV, KV, is_causal=True, enable_gqa=True, graph=graph)


def test_inputs_for_a_source_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="source_inputs name edges; the sources of this layer: self, global"):
        build_graph(Q, KV, config=SSAConfig(sources=SMALL), source_inputs={"edges": 1})


def test_a_budget_that_the_window_eats_up_warns_and_keeps_a_floor() -> None:
    config = SSAConfig(sources={"window": {"size": 4}, "topk": {}}, num_neighbors=8, dense_below=0)
    q = torch.randn(1, 1, 40, 8)
    with pytest.warns(BudgetWarning, match="9 of num_neighbors = 8; topk share 8 slots"):
        graph = build_graph(q, q, config=config)
    assert graph.slots_by_source()["topk"] == 8.0


def int32(*shape: int, fill: int = 0) -> torch.Tensor:
    return torch.full(shape, fill, dtype=torch.int32)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (
            lambda: None,
            "must return Band, Columns, Spans, Candidates, Ranges or Summaries, or several of them, got NoneType",
        ),
        (
            lambda: torch.zeros(3),
            "must return Band, Columns, Spans, Candidates, Ranges or Summaries, or several of them, got Tensor",
        ),
        (lambda: Band(0, 0), "set needs_positions = True"),
        (lambda: Columns(torch.tensor([9])), r"Columns.positions must lie in \[0, 8\], got values in \[9, 9\]"),
        (lambda: Columns(torch.tensor([0.5])), "must be int32"),
        (lambda: Columns(int32(1, 1)), r"shape \[C\]"),
        (lambda: Candidates(int32(2, 4, 9, 3, fill=9)), r"must lie in \[-1, 8\]"),
        (lambda: Candidates(int32(2, 4, 9, 3, fill=-2)), r"must lie in \[-1, 8\]"),
        (lambda: Candidates(int32(2, 3, 9, 3)), r"\[B=2 or 1, G=4 or 1, N=9 or 1, C\], got \[2, 3, 9, 3\]"),
        (lambda: Candidates(torch.zeros(2, 4, 9, 3)), "must be int32"),
        (lambda: Candidates([0]), "must be a tensor, got list"),
        (lambda: Candidates(int32(1, 1, 1, 3), torch.zeros(1, 1, 1, 2)), "Candidates.scores"),
        (lambda: Ranges(int32(1, 1, 1, 9, fill=9), None, None), "Ranges.order must lie in"),
        (lambda: Ranges(None, int32(1, 1, 9, 1, 1), None), "must both be given"),
        (lambda: Ranges(None, int32(1, 1, 9, 1, 1), int32(1, 1, 9, 1, 1, fill=10)), r"must lie in \[0, 9\]"),
        (lambda: Ranges(None, int32(1, 1, 9, 1, 1, fill=3), int32(1, 1, 9, 1, 1)), "must not exceed"),
        (lambda: Ranges(None, int32(1, 1, 9, 2, 1), int32(1, 1, 9, 2, 1)), "2 orders in dimension 3"),
        (lambda: Ranges(None, int32(1, 1, 9, 1), int32(1, 1, 9, 1)), "must have shape"),
        (lambda: Ranges(None, int32(1, 1, 9, 1, 1), int32(1, 1, 9, 1, 2)), "differ in shape"),
        (lambda: Ranges(None, None, None, "some"), "'topk' or 'all'"),
        (lambda: Ranges(None, None, None, "topk", 0), "limit must be >= 1"),
    ],
)
def test_proposals(proposal: Callable[[], Any], message: str) -> None:
    class Broken(NeighborSource):
        def propose(self, ctx):
            return proposal()

    registry = SourceRegistry(plugins=[])
    registry.register("broken", Broken)
    with pytest.raises(ProposalError, match=message):
        build_graph(Q, KV, config=SSAConfig(sources={"broken": {}}), registry=registry)


@pytest.mark.parametrize(
    ("proposal", "wrong"),
    [
        (Columns(torch.tensor([8])), False),
        (Columns(torch.tensor([9])), True),
        (Candidates(int32(2, 4, 9, 3, fill=-1)), False),
        (Candidates(int32(2, 4, 9, 3, fill=9)), True),
        (Candidates(int32(2, 4, 9, 3, fill=-2)), True),
        (Ranges(int32(1, 1, 1, 9, fill=9), None, None), True),
        (Ranges(None, int32(1, 1, 9, 1, 1), int32(1, 1, 9, 1, 1, fill=9)), False),
        (Ranges(None, int32(1, 1, 9, 1, 1), int32(1, 1, 9, 1, 1, fill=10)), True),
        (Ranges(None, int32(1, 1, 9, 1, 1, fill=3), int32(1, 1, 9, 1, 1)), True),
        (Spans(int32(1, 9), int32(1, 9, fill=10)), True),
    ],
)
def test_bounds_that_are_looked_at_together(proposal: Proposal, wrong: bool) -> None:
    pending: list[Bounds] = []
    sizes = {"batch": 2, "graph_heads": 4, "kv_heads": 2, "queries": 9, "keys": 9, "device": torch.device("cpu")}
    validate_proposals(proposal, "source", **sizes, pending=pending)
    assert pending
    assert bool(any_outside(pending, torch.device("cpu"))) is wrong


def test_band_is_checked() -> None:
    with pytest.raises(ProposalError, match=r"Band\.before must be an integer >= 0, got -1"):
        Band(-1, 0)


def test_a_source_with_parameters_needs_a_layer() -> None:
    class Learned(NeighborSource):
        def __init__(self, layer):
            super().__init__(layer)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def propose(self, ctx):
            return Ranges.everything()

    registry = SourceRegistry(plugins=[])
    registry.register("learned", Learned)
    with pytest.raises(ConfigError, match="use SparseAttention"):
        build_graph(Q, KV, config=SSAConfig(sources={"learned": {}}), registry=registry)
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, sources={"learned": {}}), registry=registry)
    assert layer(torch.randn(1, 5, 16))[0].shape == (1, 5, 16)
