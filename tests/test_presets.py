"""Presets: configurations that were chosen by measurement."""

import pytest
import torch

from ssa_framework import SparseAttention, SSAConfig, build_graph
from ssa_framework.errors import ConfigError
from ssa_framework.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_like_any_other(name: str) -> None:
    config = SSAConfig.preset(name, d_model=32, num_heads=2, causal=True)
    assert SSAConfig.from_json(config.to_json()) == config
    assert config.causal
    assert config.dense_below == "auto"
    assert list(config.source_mix) == ["global", "clusters"]
    out, stats = SparseAttention(config)(torch.randn(1, 300, 32), return_stats=True)
    assert torch.isfinite(out).all()
    assert stats["slots"]


def test_presets_are_built_of_whole_parts() -> None:
    q = torch.randn(1, 1, 4096, 16)
    for name in PRESETS:
        graph = build_graph(q, q, config=SSAConfig.preset(name, dense_below=0), is_causal=True)
        graph.validate()
        assert graph.neighbors is None
        assert graph.summaries is not None
        assert float(graph.degree().float().mean()) < 4096 / 4


def test_fields_may_be_changed() -> None:
    config = SSAConfig.preset("fast", dense_below=0, sources={"window": {}})
    assert config.dense_below == 0
    assert list(config.source_mix) == ["window"]


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset must be one of quality, balanced, fast, got 'best'"):
        SSAConfig.preset("best")
