"""A mix that holds every key leaves a model what it was: logits, gradients, generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from integrations.tiny_models import (
    CACHE,
    CAUSAL,
    LENGTH,
    bart,
    bert,
    causal_lm,
    everything,
    padding,
    positions,
    tokens,
)
from ssa_framework.integrations.transformers import use_sparse_attention

SOURCES = ("topk", "window")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


def both(model: PreTrainedModel, source: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits, dense and sparse."""
    dense = model(**inputs).logits
    with use_sparse_attention(model, everything(source), dense_layers=()):
        return dense, model(**inputs).logits


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_gradients(name: str, source: str) -> None:
    model, ids = causal_lm(name), tokens()
    dense = model(input_ids=ids, labels=ids)
    wanted = gradients(model, dense.loss)
    with use_sparse_attention(model, everything(source), dense_layers=()) as handle:
        assert any(not isinstance(layer, str) for layer in handle.layers.values())
        sparse = model(input_ids=ids, labels=ids)
        found = gradients(model, sparse.loss)
    torch.testing.assert_close(sparse.logits, dense.logits, **TOLERANCE)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, **TOLERANCE)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padded(name: str, side: str, source: str) -> None:
    mask = padding(3, LENGTH, side)
    inputs = {"input_ids": tokens(3), "attention_mask": mask, "position_ids": positions(mask)}
    dense, sparse = both(causal_lm(name), source, **inputs)
    real = mask.bool()
    torch.testing.assert_close(sparse[real], dense[real], **TOLERANCE)
    assert sparse.isfinite().all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CAUSAL)
def test_packed(name: str, source: str) -> None:
    lengths = [[11, 1, 40, 13], [30, 35]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    model, ids = causal_lm(name), tokens()
    inputs = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    dense, sparse = both(model, source, **inputs)
    torch.testing.assert_close(sparse, dense, **TOLERANCE)
    alone = model(input_ids=ids[:1, 12:52]).logits
    torch.testing.assert_close(sparse[:1, 12:52], alone, **TOLERANCE)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("decode", ["sparse", "dense"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_left_padded(name: str, decode: Any, options: dict[str, Any], source: str) -> None:
    model, ids = causal_lm(name), tokens(3, 30)
    mask = padding(3, 30, "left", 9)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    dense = model.generate(ids, **options)
    with use_sparse_attention(model, everything(source), dense_layers=(), decode=decode):
        sparse = model.generate(ids, **options)
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("decode", ["sparse", "dense", "rebuild"])
def test_prompt_in_chunks(decode: Any) -> None:
    """Many new tokens behind cached keys are routed, whatever is done with decode steps."""
    model, ids = causal_lm("llama"), tokens()
    dense = model(ids).logits
    with use_sparse_attention(model, everything("topk"), dense_layers=(), decode=decode):
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:60], **{CACHE: first[CACHE]}, use_cache=True)
        third = model(ids[:, 60:], **{CACHE: second[CACHE]}, use_cache=True)
    chunks = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(chunks, dense, **TOLERANCE)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_encoder(side: str, source: str) -> None:
    mask = padding(3, LENGTH, side) if side != "none" else torch.ones(3, LENGTH, dtype=torch.int64)
    dense, sparse = both(bert(), source, input_ids=tokens(3), attention_mask=mask)
    torch.testing.assert_close(sparse[mask.bool()], dense[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("source", SOURCES)
def test_encoder_gradients(source: str) -> None:
    model, ids = bert(), tokens()
    wanted = gradients(model, model(ids, labels=ids).loss)
    with use_sparse_attention(model, everything(source), dense_layers=()):
        found = gradients(model, model(ids, labels=ids).loss)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, **TOLERANCE)


@pytest.mark.parametrize("length", [LENGTH, 40], ids=["as-long", "shorter"])
def test_encoder_and_decoder(length: int) -> None:
    """Self-attention of both sides is sparse; cross-attention stays dense, also where both sides are as long."""
    inputs = {
        "input_ids": tokens(),
        "attention_mask": padding(2, LENGTH, "right"),
        "decoder_input_ids": tokens(2, length),
    }
    model = bart()
    dense, sparse = both(model, "topk", **inputs)
    torch.testing.assert_close(sparse, dense, **TOLERANCE)
    few = {"self": {}}
    with use_sparse_attention(model, few, dense_layers=()):
        assert not torch.allclose(model(**inputs).logits, dense, atol=1e-2)
        attending = {name for name, module in model.named_modules() if hasattr(module, "_ssa_layer")}
    assert attending == {f"model.{side}.layers.{i}.self_attn" for side in ("encoder", "decoder") for i in (0, 1)}


def test_generate_encoder_and_decoder() -> None:
    model, ids = bart(), tokens(2, 30)
    options = {"attention_mask": padding(2, 30, "right", 9), "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    dense = model.generate(ids, **options)
    with use_sparse_attention(model, everything("topk"), dense_layers=()):
        assert torch.equal(model.generate(ids, **options), dense)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def test_dtypes_and_graph_heads(dtype: torch.dtype, graph_heads: str) -> None:
    model, ids = causal_lm("llama").to(dtype), tokens()
    dense = model(ids).logits
    with use_sparse_attention(model, everything("topk", graph_heads=graph_heads), dense_layers=()):
        sparse = model(ids).logits
    assert sparse.dtype == dtype
    tolerance = {"rtol": 0.1, "atol": 2.0} if dtype == torch.bfloat16 else TOLERANCE
    torch.testing.assert_close(sparse, dense, **tolerance)


def test_autocast() -> None:
    model, ids = causal_lm("llama"), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, sparse = both(model, "topk", input_ids=ids)
    torch.testing.assert_close(sparse, dense, rtol=0.1, atol=2.0)


def test_row_of_padding_only() -> None:
    model, ids = causal_lm("llama"), tokens()
    mask = torch.ones_like(ids)
    mask[0] = 0
    dense, sparse = both(model, "topk", input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(sparse[1], dense[1], **TOLERANCE)
    assert sparse[1].isfinite().all()
