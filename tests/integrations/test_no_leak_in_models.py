"""A really sparse mix inside a model: nothing that a token may not see changes what the model says about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integrations.tiny_models import CACHE, bert, causal_lm, padding, positions, sparse_mix, tokens
from ssa_framework.integrations.transformers import use_sparse_attention

LENGTH = 150
NAMES = ("llama", "gemma3-window", "gpt2")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.mark.parametrize("name", NAMES)
def test_the_mix_is_sparse(name: str) -> None:
    model, ids = causal_lm(name), tokens(2, LENGTH)
    dense = model(ids).logits
    with use_sparse_attention(model, sparse_mix(), dense_layers=()):
        sparse = model(ids).logits
    torch.testing.assert_close(sparse[:, :15], dense[:, :15], **TOLERANCE)  # no more keys than slots
    assert not torch.allclose(sparse[:, 60:], dense[:, 60:], atol=0.05)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("name", NAMES)
def test_future_tokens(name: str, graph_heads: str) -> None:
    model, ids = causal_lm(name), tokens(2, LENGTH)
    use_sparse_attention(model, sparse_mix(graph_heads=graph_heads), dense_layers=())
    before = model(ids).logits
    for cut in (1, 63, 130):
        changed = ids.clone()
        changed[:, cut:] = tokens(2, LENGTH - cut)
        assert torch.equal(model(changed).logits[:, :cut], before[:, :cut])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_content_of_padding(name: str, side: str) -> None:
    model, ids, mask = causal_lm(name), tokens(3, LENGTH), padding(3, LENGTH, side, 40)
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    inputs = {"attention_mask": mask, "position_ids": positions(mask)}
    before = model(ids, **inputs).logits
    after = model(torch.where(mask.bool(), ids, tokens(3, LENGTH)), **inputs).logits
    assert torch.equal(after[mask.bool()], before[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
def test_content_of_padding_of_an_encoder(side: str) -> None:
    model, ids, mask = bert(), tokens(3, LENGTH), padding(3, LENGTH, side, 40)
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    before = model(ids, attention_mask=mask).logits
    after = model(torch.where(mask.bool(), ids, tokens(3, LENGTH)), attention_mask=mask).logits
    assert torch.equal(after[mask.bool()], before[mask.bool()])


@pytest.mark.parametrize("name", NAMES)
def test_left_padded_is_as_alone(name: str) -> None:
    """Also for sources that count positions (global, the segments of clusters)."""
    model, ids, mask = causal_lm(name), tokens(3, LENGTH), padding(3, LENGTH, "left", 40)
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    batched = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None]).logits[0]
        torch.testing.assert_close(batched[row, real], alone, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_other_packed_documents(name: str) -> None:
    model, ids = causal_lm(name), tokens(1, LENGTH)
    position_ids = torch.cat([torch.arange(n) for n in (50, 70, 30)])[None]
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    before = model(ids, position_ids=position_ids, use_cache=False).logits
    changed = ids.clone()
    changed[:, :50], changed[:, 120:] = tokens(1, 50), tokens(1, 30)
    after = model(changed, position_ids=position_ids, use_cache=False).logits
    assert torch.equal(after[:, 50:120], before[:, 50:120])


@pytest.mark.parametrize("name", NAMES)
def test_rebuild_decodes_what_a_prefill_computes(name: str) -> None:
    model, prompts, mask = causal_lm(name), tokens(3, 100), padding(3, 100, "left", 30)
    use_sparse_attention(model, sparse_mix(), dense_layers=(), decode="rebuild")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    steps = model.generate(prompts, attention_mask=mask, **options, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat([mask, torch.ones(3, 12, dtype=mask.dtype)], dim=1)
    whole = model(steps.sequences, attention_mask=mask, position_ids=positions(mask)).logits
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), whole[:, 99:-1], **TOLERANCE)


@pytest.mark.parametrize("decode", ["sparse", "dense", "rebuild"])
def test_generate_left_padded_is_as_alone(decode: Any) -> None:
    model, prompts, mask = causal_lm("llama"), tokens(3, 100), padding(3, 100, "left", 30)
    use_sparse_attention(model, sparse_mix(), dense_layers=(), decode=decode)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    batched = model.generate(prompts, attention_mask=mask, **options)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(prompts[row, real][None], **options)
        assert torch.equal(batched[row, 100:], alone[0, -8:])


def test_dense_decode_sees_every_key() -> None:
    """A token behind the cache attends keys that the mix would leave out."""
    model, ids = causal_lm("llama"), tokens(1, LENGTH)
    cached = model(ids[:, :-1], use_cache=True)[CACHE]
    dense = model(ids[:, -1:], **{CACHE: cached}).logits
    use_sparse_attention(model, sparse_mix(), dense_layers=(), decode="dense")
    cached.crop(-1)
    torch.testing.assert_close(model(ids[:, -1:], **{CACHE: cached}).logits, dense, **TOLERANCE)
