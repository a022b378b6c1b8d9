"""Nothing that a query may not see changes a bit of its output."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssa_framework import SparseAttention, SSAConfig, build_graph, sparse_attention
from test_identity import MIXES

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 130, 16
LEAKY_IF_WRONG = {
    **MIXES,
    "lsh-uncentred": {"lsh": {"rounds": 3, "candidates": 6, "center": False}},
    "faiss-ivf": {"self": {}, "faiss": {"index": "IVF4,Flat", "block": 32}},
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, LENGTH, DIM),
        torch.randn(BATCH, KV_HEADS, LENGTH, DIM),
        torch.randn(BATCH, KV_HEADS, LENGTH, DIM),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mix: dict[str, Any], **options: Any) -> Tensor:
    config = SSAConfig(sources=mix, num_neighbors=40)
    return sparse_attention(q, k, v, config=config, enable_gqa=True, **options)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("mix", LEAKY_IF_WRONG.values(), ids=LEAKY_IF_WRONG.keys())
def test_future_tokens(mix: dict[str, Any], graph_heads: str) -> None:
    config = SSAConfig(sources=mix, num_neighbors=40, graph_heads=graph_heads)
    q, k, v = tensors()
    before = sparse_attention(q, k, v, config=config, enable_gqa=True, is_causal=True)
    for cut in (1, 63, 100, LENGTH - 1):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, cut:] = 1e3 * torch.randn_like(x[:, :, cut:])
        after = sparse_attention(*changed, config=config, enable_gqa=True, is_causal=True)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@pytest.mark.parametrize("mix", LEAKY_IF_WRONG.values(), ids=LEAKY_IF_WRONG.keys())
def test_later_length_does_not_change_earlier_queries(mix: dict[str, Any]) -> None:
    """A prefix alone has the same neighbors as inside a longer sequence: what decoding relies on."""
    q, k, _ = tensors()
    config = SSAConfig(sources=mix, num_neighbors=40)
    whole = build_graph(q, k, config=config, is_causal=True).to_dense_mask()
    for cut in (1, 41, 64, 129):
        prefix = build_graph(q[:, :, :cut], k[:, :, :cut], config=config, is_causal=True).to_dense_mask()
        assert torch.equal(prefix, whole[:, :, :cut, :cut])


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")], ids=["large", "nan", "inf"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mix", LEAKY_IF_WRONG.values(), ids=LEAKY_IF_WRONG.keys())
def test_padded_keys(mix: dict[str, Any], causal: bool, garbage: float) -> None:
    q, k, v = tensors()
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    keep[0, :31] = False
    keep[1, 90:] = False
    before = attend(q, k, v, mix, is_causal=causal, key_padding_mask=keep)
    padded = ~keep[:, None, :, None]
    after = attend(
        q, k.masked_fill(padded, garbage), v.masked_fill(padded, garbage), mix, is_causal=causal, key_padding_mask=keep
    )
    assert not before.isnan().any()
    assert torch.equal(before, after)


@pytest.mark.parametrize("interleaved", [False, True], ids=["runs", "interleaved"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mix", LEAKY_IF_WRONG.values(), ids=LEAKY_IF_WRONG.keys())
def test_other_documents(mix: dict[str, Any], causal: bool, interleaved: bool) -> None:
    q, k, v = tensors()
    places = torch.arange(LENGTH)
    ids = (places % 3 if interleaved else places // 50).expand(BATCH, -1)
    before = attend(q, k, v, mix, is_causal=causal, segment_ids=ids)
    other = (ids != 1)[:, None, :, None]
    changed = [torch.where(other, 50 * torch.randn_like(x), x) for x in (q, k, v)]
    after = attend(*changed, mix, is_causal=causal, segment_ids=ids)
    mine = ids[0] == 1
    assert torch.equal(before[:, :, mine], after[:, :, mine])


def test_layer_with_rotary_positions_does_not_leak() -> None:
    layer = SparseAttention(SSAConfig(d_model=32, num_heads=2, num_neighbors=24, causal=True, rope_base=100.0)).eval()
    x = torch.randn(1, LENGTH, 32)
    changed = x.clone()
    changed[:, 80:] += 10
    assert torch.equal(layer(x)[0][:, :80], layer(changed)[0][:, :80])
