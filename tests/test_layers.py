"""Configurations that differ from layer to layer of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integrations.tiny_models import causal_lm
from ssa_framework import SparseAttention, SparseTransformer, SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory.capture import synthetic_layer
from ssa_framework.laboratory.compare import compare
from ssa_framework.laboratory.inspect import inspect_layer
from ssa_framework.router import Router

BASE = SSAConfig(32, 2, num_neighbors=16, sources={"self": {}, "topk": {}}, causal=True)
MIXED = BASE.replace(layers={0: "dense", 2: {"num_neighbors": 8, "sources": {"self": {}, "window": {"size": 3}}}})


def test_each_layer_gets_its_own() -> None:
    assert MIXED.for_layer(0).is_dense
    assert MIXED.for_layer(1) == BASE
    assert MIXED.for_layer(2) == BASE.replace(num_neighbors=8, sources={"self": {}, "window": {"size": 3}})
    assert BASE.for_layer(5) is BASE
    assert [c.is_dense for c in MIXED.of_every_layer()] == [False, True, False]


def test_it_survives_json() -> None:
    assert SSAConfig.from_json(MIXED.to_json()) == MIXED


def test_a_transformer_honours_it() -> None:
    torch.manual_seed(0)
    model = SparseTransformer(MIXED, 3)
    _, stats = model(torch.randn(1, 100, 32), return_stats=True)
    assert [list(found["slots"]) for found in stats] == [["dense"], ["self", "topk"], ["self", "window"]]
    assert stats[1]["neighbors_shape"][-1] == 16
    with pytest.raises(ConfigError, match="name layer 2; this model has 0 to 1"):
        SparseTransformer(MIXED, 2)


def test_a_model_of_transformers_honours_it_and_has_no_other_dense_layers(tmp_path: Any) -> None:
    model = causal_lm("llama", num_hidden_layers=4)
    path = tmp_path / "mixed.json"
    MIXED.to_json(path)
    for choice in (MIXED, path, str(path)):
        with use_sparse_attention(model, choice) as handle:
            assert handle.layers == {0: "dense", 1: BASE, 2: MIXED.for_layer(2), 3: BASE}
    with use_sparse_attention(model, MIXED.replace(layers={1: {}})) as handle:
        assert "dense" not in handle.layers.values()
    with use_sparse_attention(model, MIXED, dense_layers=(3,), layers={0: BASE, 1: "dense"}) as handle:
        assert handle.layers == {0: BASE, 1: "dense", 2: MIXED.for_layer(2), 3: "dense"}
    with pytest.raises(ConfigError, match="layer 4 does not exist"):
        use_sparse_attention(model, MIXED.replace(layers={4: "dense"}))


def test_a_layer_of_a_model_can_be_given_another_configuration() -> None:
    model = causal_lm("llama", num_hidden_layers=2)
    with use_sparse_attention(model, BASE) as handle:
        name = "model.layers.1.self_attn"
        ids = torch.randint(2, 97, (1, 60))
        few = model(ids).logits
        handle.reconfigure(name, BASE.replace(num_neighbors=60))
        assert handle.layers[1] == BASE.replace(num_neighbors=60)
        assert not torch.allclose(model(ids).logits, few)
        with pytest.raises(ConfigError, match="no sparse layer; those that are: model"):
            handle.reconfigure("model.layers.0.self_attn", BASE)
        with pytest.raises(ConfigError, match="for_layer"):
            handle.reconfigure(name, MIXED)
    torch.testing.assert_close(model(ids).logits, model(ids).logits)


def test_the_laboratory_looks_at_the_layer_that_it_has() -> None:
    layer = synthetic_layer("clustered", length=80, heads=4, kv_heads=2, head_dim=16)
    mixes = {"mixed": MIXED, "usual": BASE}
    (mixed, usual) = compare([layer], mixes, queries=40, seconds=0.0, exact_at=()).mixes
    assert mixed.quality.output_error == pytest.approx(0.0, abs=1e-6)
    assert mixed.quality.recall == 1.0
    assert mixed.quality.keys_attended == pytest.approx(mixed.quality.keys_looked_at)
    assert usual.quality.output_error > 0.01
    looked_at = inspect_layer(layer.q, layer.k, layer.v, mixes, queries=40).mixes["mixed"]
    assert list(looked_at.sources) == ["dense"]
    assert looked_at.sources["dense"].slots == looked_at.slots


@pytest.mark.parametrize("make", [SparseAttention, Router])
def test_one_layer_takes_one_configuration(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"for_layer\(index\)"):
        make(MIXED)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "non-empty"),
        ({-1: "dense"}, ">= 0"),
        ({"one": "dense"}, "an index"),
        ({1: "sparse"}, "'dense' or a mapping"),
        ({1: {"d_model": 3}}, "cannot differ in 'd_model'; it can in num_neighbors"),
        ({1: {"num_neighbors": 0}}, r"layers\[1\]: num_neighbors"),
    ],
)
def test_what_is_wrong_is_named(layers: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SSAConfig(layers=layers)
