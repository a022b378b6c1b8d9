"""Inputs of attention calls, made to order, and the dense answer to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask, make_edge_mask


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call.

    Attributes:
        q: ``[B, H, N, D]``. k, v: ``[B, Hkv, M, D]``; views of ``[B, N, H, D]``, as a projection makes them.
        causal: no key after its query.
        cross: queries and keys are different sequences.
        key_padding_mask: bool ``[B, M]``, True = a real key.
        segment_ids: int64 ``[B, N]``, the packed document of every token.
        query_positions: int64 ``[N]``, where the queries stand among the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    cross: bool = False
    key_padding_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    query_positions: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def edge_mask(self) -> EdgeMask:
        """What restricts the edges of this call."""
        return make_edge_mask(
            batch=self.batch,
            heads=self.heads,
            queries=self.queries,
            keys=self.keys,
            device=self.q.device,
            causal=self.causal,
            query_positions=self.query_positions,
            key_padding_mask=self.key_padding_mask,
            segment_ids=self.segment_ids,
        )

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same call in another dtype."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def with_grad(self) -> AttentionInputs:
        """The same call with q, k and v as leaves that collect gradients."""
        q, k, v = (x.detach().clone().requires_grad_(True) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    def elements(self, batch: Sequence[int]) -> AttentionInputs:
        """The same call for these batch elements, which may repeat."""
        index = torch.tensor(batch)
        keep, ids = self.key_padding_mask, self.segment_ids
        return replace(
            self,
            q=self.q[index],
            k=self.k[index],
            v=self.v[index],
            key_padding_mask=None if keep is None else keep[index],
            segment_ids=None if ids is None else ids[index],
        )

    def changed(self, tokens: Tensor, values: float | Tensor) -> AttentionInputs:
        """The same call with other vectors for some tokens of self-attention.

        Args:
            tokens: bool ``[B, N]``, which ones. values: what q, k and v become there; broadcasts to them.
        """
        where = tokens[:, None, :, None]
        q, k, v = (torch.where(where, torch.as_tensor(values, dtype=x.dtype), x) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 63,
    keys: int | None = None,
    head_dim: int = 16,
    causal: bool = False,
    cross: bool = False,
    padded: bool = False,
    packed: bool = False,
    chunk: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> AttentionInputs:
    """Gaussian q, k, v, the same for the same seed.

    Args:
        batch, heads, kv_heads, queries, keys, head_dim: B, H, Hkv, N, M (N if left out), D.
        causal, cross: see `AttentionInputs`.
        padded: with the mask of `padding_mask`. packed: with the documents of `packed_ids`.
        chunk: the queries are the last N of M tokens, as in decoding by chunks.
    """
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (
        torch.randn((batch, length, count, head_dim), generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for count, length in shapes
    )
    return AttentionInputs(
        q,
        k,
        v,
        causal=causal,
        cross=cross,
        key_padding_mask=padding_mask(batch, keys) if padded else None,
        segment_ids=packed_ids(batch, keys) if packed else None,
        query_positions=torch.arange(keys - queries, keys) if chunk else None,
    )


def padding_mask(batch: int, keys: int) -> Tensor:
    """bool ``[B, M]``, True = a real key: in turn, a fifth padded on the right, on the left, one hole, nothing."""
    mask = torch.ones((batch, keys), dtype=torch.bool)
    padding = keys // 5
    for element in range(batch):
        if element % 4 == 0:
            mask[element, keys - padding :] = False
        elif element % 4 == 1:
            mask[element, :padding] = False
        elif element % 4 == 2:
            mask[element, keys // 2] = keys < 2
    return mask


def packed_ids(batch: int, tokens: int) -> Tensor:
    """int64 ``[B, N]``: three documents of unequal lengths, others in every batch element, ids in no order."""
    ids = torch.empty((batch, tokens), dtype=torch.int64)
    for element in range(batch):
        first, second = tokens // (3 + element), tokens * 2 // (3 + element % 2)
        ids[element, :first], ids[element, first:second], ids[element, second:] = 7, 3, 5
    return ids


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over every pair that ``mask [B, H, N, M]`` allows, in plain torch; zeros where a query has none.

    ``bias``, of the same shape, is added to the scores.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask
    return weights @ v


def graph_attention(q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph) -> Tensor:
    """Dense attention over the edges of a graph, and over its summaries as explicit pseudo-keys."""
    mask = graph.to_dense_mask()
    summaries = graph.summaries
    if summaries is None:
        return dense_attention(q, k, v, mask)
    number = torch.arange(summaries.count, dtype=torch.int32)
    member = (summaries.members[:, :, :, None] == number[:, None]).any(2).to(k.dtype)  # [B or 1, Hkv or 1, C, M]
    size = member.sum(-1, keepdim=True)
    k, v = (torch.cat([x, member @ x / size.clamp(min=1)], dim=2) for x in (k, v))
    weight = size[..., 0].clamp(min=1).log().repeat_interleave(q.shape[1] // size.shape[1], dim=1)
    seen = graph.summary_mask()
    bias = torch.cat([torch.zeros_like(mask, dtype=k.dtype), weight[:, :, None].expand(seen.shape)], dim=-1)
    return dense_attention(q, k, v, torch.cat([mask, seen], dim=-1), bias)


CASES: Mapping[str, Mapping[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "multi-head": {"kv_heads": 4, "causal": True},
    "multi-query": {"kv_heads": 1, "causal": True},
    "one-element": {"batch": 1},
    "length-1": {"queries": 1},
    "length-1-causal": {"queries": 1, "causal": True},
    "length-65": {"queries": 65},
    "length-65-causal": {"queries": 65, "causal": True},
    "padded": {"padded": True, "batch": 3},
    "padded-causal": {"padded": True, "causal": True},
    "packed": {"packed": True},
    "packed-causal": {"packed": True, "causal": True},
    "packed-padded-causal": {"packed": True, "padded": True, "causal": True},
    "chunk-causal": {"queries": 9, "keys": 65, "chunk": True, "causal": True},
    "cross": {"queries": 17, "keys": 63, "cross": True},
    "cross-more-queries": {"queries": 65, "keys": 33, "cross": True},
}
"""Arguments of `make_inputs`, by name: what the contract runs on."""
