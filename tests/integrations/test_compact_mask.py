"""The mask function: what it tells the layers, and that nothing in it grows with N × M."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    packed_sequence_mask_function,
)

from integrations.tiny_models import causal_lm, everything, make_mask, padding, sparse_mix, tokens
from ssa_framework.errors import MaskError
from ssa_framework.integrations.transformers import CompactMask, compact_mask, use_sparse_attention
from ssa_framework.integrations.transformers.compact_mask import packed_segments

CPU = torch.device("cpu")
OPTIONS = inspect.signature(create_causal_mask).parameters  # not every version has all of them


def config(name: str = "llama") -> Any:
    model = causal_lm(name)
    use_sparse_attention(model, sparse_mix())
    config.model = model  # keeps it sparse as long as the test runs
    return model.config


def embeddings(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, 64)


def cache_of(length: int, batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(batch, 2, length, 16), torch.zeros(batch, 2, length, 16), 0)
    return cache


def test_causal() -> None:
    mask = make_mask(create_causal_mask, config(), embeddings(2, 9))
    assert isinstance(mask, CompactMask)
    assert (mask.batch, mask.queries, mask.keys, mask.offset, mask.causal) == (2, 9, 9, 0, True)
    assert mask.padding is mask.segments is mask.window is mask.unknown is mask.dense is None


def test_behind_a_cache() -> None:
    mask = make_mask(create_causal_mask, config(), embeddings(2, 3), torch.ones(2, 10), cache_of(7))
    assert (mask.queries, mask.keys, mask.offset, mask.padding) == (3, 10, 7, None)
    (piece,) = mask.pieces(CPU)
    assert piece.mask.positions.tolist() == [[7, 8, 9]]
    assert piece.mask.offset == 7


def test_bidirectional() -> None:
    mask = create_bidirectional_mask(config(), embeddings(2, 9), padding(2, 9, "right", 4))
    assert mask.causal is False
    assert mask.padding.tolist() == padding(2, 9, "right", 4).bool().tolist()


def test_all_ones_is_no_padding() -> None:
    assert make_mask(create_causal_mask, config(), embeddings(2, 9), torch.ones(2, 9)).padding is None


def test_packed_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    mask = make_mask(create_causal_mask, config(), embeddings(2, 6), position_ids=positions)
    assert mask.segments.tolist() == [[0, 0, 0, 1, 2, 2], [0] * 6]
    assert mask.unknown is None
    whole = make_mask(create_causal_mask, config(), embeddings(1, 6), position_ids=torch.arange(6)[None])
    assert whole.segments is None


def test_forms_of_packed_documents() -> None:
    """Versions of transformers combine documents and causality in either order, with or without positions of their
    own; what combines anything else is not taken for packed documents."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2]])
    packed = packed_sequence_mask_function(documents)
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    remapped = [] if remap is None else [remap(causal_mask_function, torch.tensor([[0, 1, 2, 0, 0, 1]]))]
    for causal in (causal_mask_function, *remapped):
        for parts in ((packed, causal), (causal, packed)):
            assert packed_segments(and_masks(*parts)) is documents
            assert packed_segments(or_masks(*parts)) is None
            assert packed_segments(and_masks(and_masks(*parts), causal)) is None
            assert packed_segments(and_masks(*parts, bidirectional_mask_function)) is None
    others = [] if remap is None else [remap(bidirectional_mask_function, documents)]
    for other in (bidirectional_mask_function, packed, *others):
        assert packed_segments(and_masks(packed, other)) is None
    assert packed_segments(packed) is packed_segments(causal_mask_function) is None


def test_sliding_window() -> None:
    mask = make_mask(create_sliding_window_causal_mask, config("gemma3-window"), embeddings(1, 9))
    assert mask.window == 7
    assert mask.dense.shape == (1, 1, 9, 9)
    assert mask.dense[0, 0].sum(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_left_padding_is_taken_off() -> None:
    keep = torch.ones(4, 9, dtype=torch.int64)
    keep[0, :5] = keep[1, :5] = keep[3, :2] = 0
    keep[3, 8] = 0
    mask = make_mask(create_causal_mask, config(), embeddings(4, 9), keep)
    pieces = mask.pieces(CPU)
    assert [(p.rows, p.first_query, p.first_key) for p in pieces] == [
        (slice(0, 2), 5, 5), (slice(2, 3), 0, 0), (slice(3, 4), 2, 2)
    ]  # fmt: skip
    assert [p.mask.key_keep is None for p in pieces] == [True, True, False]
    assert pieces is mask.pieces(CPU)


def test_left_padding_behind_a_cache() -> None:
    keep = torch.ones(2, 10, dtype=torch.int64)
    keep[0, :8] = 0
    pieces = make_mask(create_causal_mask, config(), embeddings(2, 3), keep, cache_of(7)).pieces(CPU)
    assert [(p.first_query, p.first_key, p.mask.positions.tolist()) for p in pieces] == [
        (1, 8, [[0, 1]]), (0, 0, [[7, 8, 9]])
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [how for how in ("and_mask_function", "or_mask_function", "block_sequence_ids") if how in OPTIONS],
)
def test_other_masks_are_not_mistaken(how: str) -> None:
    """A mask that says more than the description is refused by sparse layers, and dense layers still serve it."""
    extra: Any = lambda b, h, q, k: k % 2 == 0  # noqa: E731
    if how == "block_sequence_ids":
        extra = torch.tensor([[-1, 0, 0, -1, -1, 1]])
    mask = make_mask(create_causal_mask, config(), embeddings(1, 6), **{how: extra})
    assert mask.unknown is not None
    assert mask.dense.shape == (1, 1, 6, 6)
    attention = config.model.model.layers[1].self_attn
    hidden = torch.randn(1, 6, 64)
    rotary = config.model.model.rotary_emb(hidden, torch.arange(6)[None])
    with pytest.raises(MaskError, match=r"model.layers.1.self_attn got a mask function of its own"):
        attention(hidden_states=hidden, position_embeddings=rotary, attention_mask=mask)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if dataclasses.is_dataclass(value):
        return tensors_in(vars(value))
    return []


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_nothing_grows_with_queries_times_keys(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model without dense layers, the mask of N tokens has no more than a few numbers for each."""
    made = []

    def record(*args: Any, **options: Any) -> CompactMask:
        made.append(compact_mask(*args, **options))
        return made[-1]

    from transformers import AttentionMaskInterface

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "ssa_framework", record)
    model, length = causal_lm("llama", max_position_embeddings=4096), 1023
    inputs: dict[str, Any] = {"attention_mask": padding(2, length, "left", 99)}
    if kind == "packed":
        inputs = {"position_ids": (torch.arange(length) % 400)[None], "use_cache": False}
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    with torch.no_grad():
        model(tokens(2, length), **inputs)
    (mask,) = made
    found = tensors_in(vars(mask))
    assert found
    assert max(tensor.numel() for tensor in found) <= 2 * length


def test_model_that_makes_no_mask() -> None:
    """Without a mask the module says whether it is causal."""
    model, q = causal_lm("llama"), torch.randn(1, 4, 9, 16)
    use_sparse_attention(model, everything("topk"))
    attention = model.model.layers[1].self_attn
    from transformers import AttentionInterface

    function = AttentionInterface()["ssa_framework"]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for causal in (None, True, False):
        out, weights = function(attention, q, q[:, :2], q[:, 2:], None, is_causal=causal, scaling=0.3)
        k, v = (x.repeat_interleave(2, dim=1) for x in (q[:, :2], q[:, 2:]))
        wanted = sdpa(q, k, v, is_causal=causal is not False, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(out, wanted)
        assert weights is None
