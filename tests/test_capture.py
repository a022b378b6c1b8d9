"""Queries, keys and values of models, in files, and made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from integrations.tiny_models import bart, bert, causal_lm
from ssa_framework import SSAConfig
from ssa_framework.errors import ConfigError, ShapeError
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory.capture import (
    LayerTensors,
    capture_layers,
    choose_layers,
    load_layers,
    save_layer,
    synthetic_layer,
)


def tokens(length: int = 21, batch: int = 1) -> Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(0))


def captured(model: Any, ids: Tensor, **options: Any) -> list[LayerTensors]:
    found: list[LayerTensors] = []
    capture_layers(model, ids, found.append, **options)
    return found


def dense(layer: LayerTensors) -> Tensor:
    return F.scaled_dot_product_attention(
        layer.q, layer.k, layer.v, is_causal=layer.causal, scale=layer.scale, enable_gqa=True
    )


# -- of a model ------------------------------------------------------------------------------------------------------


def outputs_of_attention(model: Any, ids: Tensor) -> list[Tensor]:
    """What every attention module hands to its output projection: ``[B, N, H · D]``, as the model computes it."""
    seen: list[Tensor] = []
    modules = [module for module in model.modules() if hasattr(module, "o_proj")]
    hooks = [m.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in modules]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_attention_over_what_is_captured_is_that_of_the_model(name: str) -> None:
    model, ids = causal_lm(name), tokens(batch=2)
    layers = captured(model, ids)
    assert [layer.layer for layer in layers] == [0, 1]
    for layer, expected in zip(layers, outputs_of_attention(model, ids), strict=True):
        assert (layer.q.shape[1], layer.k.shape[1], layer.length, layer.causal) == (4, 2, 21, True)
        torch.testing.assert_close(dense(layer).transpose(1, 2).flatten(2), expected)


def test_scale_of_the_model_is_kept() -> None:
    layers = captured(causal_lm("gpt2"), tokens())  # which scales layer i by 1 / (i + 1)
    assert [layer.scale for layer in layers] == pytest.approx([1 / 4, 1 / 8])


def test_encoders_are_not_causal() -> None:
    (first, _) = captured(bert(), tokens())
    assert not first.causal


def test_layers_are_chosen_and_the_pass_ends_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama", num_hidden_layers=4)
    after: list[int] = []
    model.model.layers[2].register_forward_hook(lambda *_: after.append(2))
    assert [layer.layer for layer in captured(model, tokens(), layers=[1, 0])] == [0, 1]
    assert not after
    assert [layer.layer for layer in captured(model, tokens(), layers=[-1])] == [3]
    assert after == [2]


def test_windowed_layers_are_left_out() -> None:
    model = causal_lm("gemma3-window")
    assert choose_layers(model) == (1,)
    assert [layer.layer for layer in captured(model, tokens())] == [1]
    with pytest.raises(ConfigError, match="layer 0 attends a sliding window"):
        captured(model, tokens(), layers=[0])


def test_model_is_as_before() -> None:
    model, ids = causal_lm("llama", attention_dropout=0.5), tokens()
    with torch.no_grad():
        before = model(ids).logits
    model.train()
    first, again = captured(model, ids)[0], captured(model, ids)[0]
    assert torch.equal(first.q, again.q)
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not first.q.requires_grad


def test_sparse_models_are_captured_densely() -> None:
    model, ids = causal_lm("llama"), tokens()
    expected = captured(model, ids)
    with use_sparse_attention(model, SSAConfig(sources={"self": {}}, dense_below=0)):
        for layer, same in zip(captured(model, ids), expected, strict=True):
            assert torch.equal(layer.v, same.v)


def test_what_the_consumer_raises_leaves_the_model_as_before() -> None:
    def fail(_: LayerTensors) -> None:
        raise KeyboardInterrupt

    model = causal_lm("llama")
    with pytest.raises(KeyboardInterrupt):
        capture_layers(model, tokens(), fail)
    assert model.config._attn_implementation == "sdpa"
    assert len(captured(model, tokens())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layer 2 does not exist; this model has layers 0 to 1"),
        ({"layers": [-3]}, "layer -3 does not exist"),
        ({"layers": []}, "no layers were asked for"),
        ({"layers": [True]}, "layer True does not exist"),
    ],
    ids=str,
)
def test_bad_layers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        captured(causal_lm("llama"), tokens(), **options)


def test_more_tokens_than_the_model_reads() -> None:
    with pytest.raises(ConfigError, match="reads up to 256 tokens, got 300"):
        captured(causal_lm("llama"), tokens(300))


def test_models_with_two_sides_are_refused() -> None:
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        captured(bart(), tokens())


def test_tokens_must_be_integers_in_rows() -> None:
    for wrong in (torch.zeros(1, 3), torch.zeros(3, dtype=torch.long), torch.zeros((1, 0), dtype=torch.long)):
        with pytest.raises(ShapeError, match=r"integers \[B, N\]"):
            captured(causal_lm("llama"), wrong)


# -- in files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_layers_come_back_from_files(file_format: Any, tmp_path: Path) -> None:
    layers = [
        LayerTensors(3, *(torch.randn(2, h, 7, 4) for h in (4, 2, 2)), scale=0.3, causal=False),
        LayerTensors(11, *(torch.randn(1, 4, 9, 8).bfloat16().transpose(1, 2).mT[:, :4] for _ in range(3))),
    ]
    for layer in layers:
        assert save_layer(layer, tmp_path / "new", file_format=file_format).suffix == f".{file_format}"
    loaded = list(load_layers(tmp_path / "new"))
    assert [(x.layer, x.scale, x.causal) for x in loaded] == [(3, 0.3, False), (11, None, True)]
    for layer, same in zip(layers, loaded, strict=True):
        assert all(torch.equal(getattr(layer, name), getattr(same, name)) for name in "qkv")
    assert [x.layer for x in load_layers(tmp_path / "new", [11])] == [11]
    with pytest.raises(ConfigError, match="holds no layer 4"):
        list(load_layers(tmp_path / "new", [4, 11]))


def test_files_without_batch_and_number(tmp_path: Path) -> None:
    tensors = {name: torch.randn(heads, 9, 4) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    torch.save({**tensors, "scale": 0.25}, tmp_path / "qkv_L05_N9.pt")
    (layer,) = load_layers(tmp_path)
    assert (layer.layer, layer.scale, layer.causal, layer.q.shape) == (5, 0.25, True, (1, 4, 9, 4))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no captured layers"):
        list(load_layers(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"a\.pt: not a file of tensors"):
        list(load_layers(tmp_path))
    torch.save({"q": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"expected tensors q, k and v, got \['q'\]"):
        list(load_layers(tmp_path))
    with pytest.raises(ConfigError, match="file_format must be 'pt' or 'safetensors', got 'npz'"):
        save_layer(synthetic_layer("gaussian", length=4), tmp_path, file_format="npz")  # type: ignore[arg-type]


# -- made up ---------------------------------------------------------------------------------------------------------


def test_synthetic_layers_follow_the_seed() -> None:
    first, again, other = (
        synthetic_layer("clustered", length=70, heads=4, kv_heads=2, head_dim=8, seed=seed) for seed in (0, 0, 1)
    )
    assert (first.q.shape, first.k.shape, first.v.shape) == ((1, 4, 70, 8), (1, 2, 70, 8), (1, 2, 70, 8))
    assert torch.equal(first.k, again.k)
    assert not torch.equal(first.k, other.k)


def test_topics_attract_their_queries() -> None:
    layer = synthetic_layer("clustered", length=64, heads=1)
    scores = layer.q[0, 0] @ layer.k[0, 0].T
    same, other = scores[:32, :32].mean(), scores[:32, 32:].mean()  # two runs
    assert same > other + 30  # 64 coordinates, whose squares have a mean of 1
    gaussian = synthetic_layer("gaussian", length=64, heads=1)
    assert abs(float((gaussian.q[0, 0] @ gaussian.k[0, 0].T).mean())) < 2


@pytest.mark.parametrize("change", [{"kind": "uniform"}, {"length": 0}, {"head_dim": True}], ids=str)
def test_bad_synthetic_layers(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        synthetic_layer(**{"kind": "gaussian", "length": 8, **change})


def test_layers_must_fit_together() -> None:
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ShapeError, match="as many queries as keys"):
        LayerTensors(0, q, q[:, :, :4], q[:, :, :4])
    with pytest.raises(ShapeError, match="at least one"):
        LayerTensors(0, *[q[:, :, :0]] * 3)


def test_numbers_that_are_not_finite_are_found() -> None:
    q = torch.zeros(1, 2, 5, 4)
    v = q.clone()
    v[0, 1, 2, 3] = torch.nan
    with pytest.raises(ConfigError, match="layer 7: v hold numbers that are not finite"):
        LayerTensors(7, q, q, v).require_finite()
