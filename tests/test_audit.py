"""The attention mass that a graph misses, estimated at run time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssa_framework import SparseAttention, SparseTransformer, SSAConfig, build_graph, sparse_attention
from ssa_framework.audit import AuditReport, MissMonitor, audit_graph, combine_audits, student_quantile
from ssa_framework.config import AuditOptions
from ssa_framework.errors import ConfigError
from ssa_framework.laboratory.capture import synthetic_layer
from ssa_framework.quality import measure
from ssa_framework.registry import SourceRegistry

MIXES: dict[str, dict[str, Any]] = {
    "topk": {"sources": {"global": {"tokens": 2}, "topk": {}}, "num_neighbors": 30},
    "window": {"sources": {"self": {}, "window": {"size": 30}}, "num_neighbors": 32},
    "clusters": {"sources": {"clusters": {"levels": [[64, 8]], "keys": 32}}},
    "shared by a group": {"sources": {"topk": {}}, "num_neighbors": 30, "graph_heads": "kv"},
}


def tensors(length: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    layer = synthetic_layer("clustered", length=length, heads=4, kv_heads=2, head_dim=16, seed=1)
    return 0.6 * layer.q, layer.k, layer.v


def exact_miss(q: Tensor, k: Tensor, v: Tensor, graph: Any) -> float:
    return 1.0 - measure(q, k, v, graph, sample=q.shape[2]).attention_mass


@pytest.mark.parametrize("mix", MIXES)
def test_all_keys_of_all_queries_give_the_exact_mass(mix: str) -> None:
    q, k, v = tensors()
    graph = build_graph(q, k, config=SSAConfig(dense_below=0, **MIXES[mix]), is_causal=True)
    report = audit_graph(q, k, graph, options=AuditOptions(queries=300, keys=None))
    assert report is not None
    assert report.missed_mass == pytest.approx(exact_miss(q, k, v, graph), abs=1e-5)
    assert report.low == report.high == report.missed_mass
    assert report.queries == 300


@pytest.mark.parametrize("mix", ["topk", "window", "clusters"])
@pytest.mark.parametrize("keys", [16, 128, None])
def test_the_estimate_is_unbiased_and_its_interval_covers_the_exact_mass_as_often_as_it_says(
    mix: str, keys: int | None
) -> None:
    q, k, v = tensors()
    graph = build_graph(q, k, config=SSAConfig(dense_below=0, **MIXES[mix]), is_causal=True)
    exact = exact_miss(q, k, v, graph)
    generator = torch.Generator().manual_seed(5)
    options = AuditOptions(queries=24, keys=keys, confidence=0.9)
    reports = [audit_graph(q, k, graph, options=options, generator=generator) for _ in range(200)]
    found = [report for report in reports if report is not None]
    means = torch.tensor([report.missed_mass for report in found], dtype=torch.float64)
    assert abs(float(means.mean()) - exact) < 3.5 * float(means.std()) / math.sqrt(len(found))
    covered = sum(report.low <= exact <= report.high for report in found)
    spread = math.sqrt(200 * 0.9 * 0.1)
    assert abs(covered - 180) <= 3.3 * spread  # but for one of 1,000 experiments


def test_masks_hide_keys_and_biases_count() -> None:
    q, k, v = tensors(120)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 4, 120, 120, generator=generator)
    bias[..., 40:50] = float("-inf")
    keep = torch.ones(1, 120, dtype=torch.bool)
    keep[:, 100:] = False
    config = SSAConfig(num_neighbors=8, sources={"topk": {}}, dense_below=0)
    graph = build_graph(q, k, config=config, is_causal=True, attn_mask=bias, key_padding_mask=keep)
    exact = exact_miss(q, k, v, graph)
    for keys in (None, 119):
        report = audit_graph(q, k, graph, options=AuditOptions(queries=120, keys=keys))
        assert report is not None
        assert report.missed_mass == pytest.approx(exact, abs=2e-5 if keys is None else 0.02)


def test_gathered_keys_give_the_same_as_products_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors()
    graph = build_graph(q, k, config=SSAConfig(dense_below=0, **MIXES["topk"]), is_causal=True)
    first = audit_graph(q, k, graph, options=AuditOptions(keys=16))
    monkeypatch.setattr("ssa_framework.audit._SCAN", 0)
    second = audit_graph(q, k, graph, options=AuditOptions(keys=16))
    assert first is not None
    assert second is not None
    assert second.missed_mass == pytest.approx(first.missed_mass, rel=1e-5)
    assert second.high == pytest.approx(first.high, rel=1e-5)


def test_a_graph_of_everything_misses_nothing_and_an_empty_one_is_not_audited() -> None:
    q, k, _ = tensors(40)
    graph = build_graph(q, k, config=SSAConfig(sources={"topk": {}}), is_causal=True)
    report = audit_graph(q, k, graph)
    assert report is not None
    assert (report.missed_mass, report.low, report.high) == (0.0, 0.0, 0.0)
    assert audit_graph(q[:, :, :0], k, build_graph(q[:, :, :0], k, is_causal=True)) is None


def test_a_single_query_says_nothing_about_the_others() -> None:
    q, k, _ = tensors()
    graph = build_graph(q, k, config=SSAConfig(dense_below=0, **MIXES["topk"]), is_causal=True)
    report = audit_graph(q, k, graph, options=AuditOptions(queries=1))
    assert report is not None
    assert (report.low, report.high) == (0.0, 1.0)
    assert report.as_dict()["standard_error"] is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (15, 2.13145), (100, 1.98397)]
)
def test_quantiles_are_those_of_student(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=0.005)


def test_a_layer_reports_it_and_draws_anew_in_every_call() -> None:
    torch.manual_seed(0)
    config = SSAConfig(32, 2, num_neighbors=16, causal=True, dense_below=0, audit={"queries": 8, "every": 2})
    layer = SparseAttention(config)
    x = torch.randn(1, 200, 32)
    stats_of_calls = [layer(x, return_stats=True)[1] for _ in range(3)]
    first, between, last = (found.get("audit") for found in stats_of_calls)
    assert between is None
    assert first is not None
    assert last is not None
    assert first["queries"] == 8
    assert first["seconds"] > 0
    assert 0 <= first["low"] <= first["missed_mass"] <= first["high"] <= 1
    assert first["missed_mass"] != last["missed_mass"]
    silent = SparseAttention(config.replace(audit=None))
    silent.load_state_dict(layer.state_dict())
    out, found = silent(x, return_stats=True)
    assert "audit" not in found
    torch.testing.assert_close(out, layer(x)[0])


def test_the_monitor_calls_back_for_the_layer_that_misses_too_much_and_a_larger_budget_helps() -> None:
    torch.manual_seed(0)
    registry = SourceRegistry(plugins=[])
    called: list[AuditReport] = []
    monitor = MissMonitor(0.3, called.append, window=2)
    registry.register_plugin(monitor)
    mix: dict[str, Any] = {"self": {}, "window": {"size": 4}, "topk": {}}
    base = SSAConfig(32, 2, num_neighbors=16, sources=mix, causal=True, dense_below=0, audit=True)
    model = SparseTransformer(base.replace(layers={1: {"num_neighbors": 190}}), 2, registry=registry)
    x = torch.randn(1, 200, 32)
    model(x)
    assert [report.layer for report in called] == ["layers.0"]
    assert called[0].low > 0.3
    few = model.layers[0].attn
    few.reconfigure(few.config.replace(num_neighbors=190))
    model(x)
    model(x)
    assert len(called) == 1
    assert monitor.reports()["layers.0"].high < 0.3
    with pytest.raises(ConfigError, match="keeps its d_model"):
        few.reconfigure(SSAConfig(64, 2))


def test_the_function_tells_the_observers() -> None:
    registry = SourceRegistry(plugins=[])
    called: list[AuditReport] = []
    registry.register_plugin(MissMonitor(0.0, called.append))
    q, k, v = tensors()
    config = SSAConfig(dense_below=0, audit={"keys": None}, **MIXES["topk"])
    sparse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config, registry=registry)
    assert called[0].missed_mass > 0


def test_reports_are_combined_by_their_queries() -> None:
    one = AuditReport("a", 0.1, 0.0, 0.2, 0.03, 0.95, 10, 5.0, 1.0)
    other = AuditReport("b", 0.4, 0.3, 0.5, 0.06, 0.95, 30, 7.0, 2.0)
    both = combine_audits([one, other])
    assert both.missed_mass == pytest.approx(0.25 * 0.1 + 0.75 * 0.4)
    assert both.standard_error == pytest.approx(math.hypot(0.25 * 0.03, 0.75 * 0.06))
    assert (both.queries, both.keys, both.seconds, both.layer) == (40, 6.5, 3.0, "")
    with pytest.raises(ConfigError, match="no report"):
        combine_audits([])


@pytest.mark.parametrize(
    ("audit", "says"),
    [
        ({"queries": 0}, "queries"),
        ({"keys": 1}, "keys"),
        ({"confidence": 1.0}, "confidence"),
        ({"every": 0}, "every"),
        ({"query": 3}, "no option 'query'; its options: queries"),
        (3, "True, a mapping"),
    ],
)
def test_options_out_of_range_are_named(audit: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SSAConfig(audit=audit)


def test_the_options_survive_json() -> None:
    config = SSAConfig(audit={"queries": 4})
    assert SSAConfig.from_json(config.to_json()) == config
    assert config.audit_options == AuditOptions(queries=4)
    assert SSAConfig(audit=True).audit_options == AuditOptions()
    assert SSAConfig(audit=False).audit_options is None
