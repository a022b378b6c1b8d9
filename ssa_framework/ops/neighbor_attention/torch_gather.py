"""Chunked gather in torch: bounded memory, any device that torch has, forward and recomputing backward.

Queries are taken in chunks. Of a chunk, the band is one dense tile of consecutive keys, the columns are a second
tile, and the listed keys are gathered; all scores of a query meet in one softmax, which is the log-sum-exp merge of
the parts. The backward pass computes the same scores again from ``lse``, so nothing of size N·K·D is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.parts import GraphParts

WORK_BYTES = 32 * 2**20
"""What the temporaries of one chunk may take, about."""


@dataclass(frozen=True)
class _Chunk:
    """Scores and edges of a chunk of T queries: b batch elements, Hkv KV heads, g query heads each, E edges."""

    batch: slice
    rows: slice
    queries: Tensor  # [b, Hkv, g, T, D]
    tile: slice  # keys of the band tile
    columns: Tensor | None  # int64 [C]
    flat: Tensor | None  # int64 [b, Hx, T, K], rows of the flattened keys; Hx = Hkv or H
    gathered: Tensor | None  # keys [b, Hkv, g or 1, T, K, D]
    scores: Tensor  # [b, Hkv, g, T, E], -inf where there is no edge

    @property
    def tile_size(self) -> int:
        return self.tile.stop - self.tile.start

    def split(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., E]`` → the edges of tile, columns and lists."""
        columns = 0 if self.columns is None else self.columns.numel()
        listed = 0 if self.flat is None else self.flat.shape[-1]
        first, second, third = edges.split([self.tile_size, columns, listed], dim=-1)
        return first, second, third


def _chunks(
    q: Tensor, k: Tensor, parts: GraphParts, scale: float, compute: torch.dtype
) -> Iterator[tuple[_Chunk, GraphParts]]:
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    listed = parts.neighbors.shape[-1] if parts.neighbors is not None else 0
    list_heads = heads if parts.neighbors is not None and parts.neighbors.shape[1] > kv_heads else kv_heads
    columns = parts.columns.long() if parts.columns is not None and parts.columns.numel() else None
    width = 0 if not parts.has_band else min(keys, parts.band_before + parts.band_after + 1)
    fixed = width + (columns.numel() if columns is not None else 0)
    # a row needs its scores (three copies of E at the peak) and its gathered keys or values
    row_bytes = 4 * (heads * 3 * (fixed + listed) + list_heads * 2 * listed * dim)
    rows_at_once = max(1, WORK_BYTES // max(1, row_bytes))
    batch_step = max(1, min(batch, rows_at_once // 64))
    row_step = max(1, min(queries, rows_at_once // batch_step))
    if width and width < keys:  # the tile of T queries is T + width keys wide, so T beyond the width only wastes
        row_step = min(row_step, max(64, width))
    for b in range(0, batch, batch_step):
        batch_slice = slice(b, min(b + batch_step, batch))
        part = parts.batch_element(batch_slice)
        k_batch = k[batch_slice]
        for r in range(0, queries, row_step):
            rows = slice(r, min(r + row_step, queries))
            yield _score(q, k_batch, part, scale, compute, batch_slice, rows, columns, group), part


def _score(
    q: Tensor,
    k: Tensor,
    parts: GraphParts,
    scale: float,
    compute: torch.dtype,
    batch: slice,
    rows: slice,
    columns: Tensor | None,
    group: int,
) -> _Chunk:
    b, kv_heads, keys, _ = k.shape
    queries = q[batch, :, rows].to(compute).unflatten(1, (kv_heads, group))  # [b, Hkv, g, T, D]
    positions = torch.arange(rows.start, rows.stop, device=q.device) + parts.query_offset
    low, high = parts.tile(rows, keys)
    tile = slice(low, high)
    pieces = []
    if high > low:
        tile_keys = torch.arange(low, high, device=q.device)
        allowed = parts.restrict(parts.band_allowed(positions, tile_keys), rows, tile_keys)
        pieces.append(_tile_scores(queries, k[:, :, tile].to(compute), allowed, scale))
    if columns is not None:
        allowed = parts.restrict(parts.columns_allowed(positions, columns), rows, columns)
        pieces.append(_tile_scores(queries, k[:, :, columns].to(compute), allowed, scale))
    flat = gathered = None
    if parts.neighbors is not None and parts.neighbors.shape[-1] and keys:
        listed = parts.neighbors[:, :, rows]
        flat = _flat_rows(listed, b, kv_heads, group, keys)
        gathered = _gather(k, flat, kv_heads).to(compute)
        scores = _list_scores(queries, gathered) * scale
        if parts.bias is not None:
            scores = scores + _by_group(parts.bias[:, :, rows].to(compute), kv_heads)
        pieces.append(scores.masked_fill(_by_group(listed < 0, kv_heads), float("-inf")))
    scores = torch.cat(pieces, dim=-1) if pieces else queries.new_empty((*queries.shape[:-1], 0))
    return _Chunk(batch, rows, queries, tile, columns, flat, gathered, scores)


def _tile_scores(queries: Tensor, keys: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """``[b, Hkv, g, T, D]`` by ``[b, Hkv, C, D]`` → ``[b, Hkv, g, T, C]``; ``allowed`` is ``[b or 1, 1, T, C]``."""
    scores = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, queries.shape[2:4])
    return (scores * scale).masked_fill(~allowed[:, :, None], float("-inf"))


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """``[b or 1, 1 or Hkv or H, T, K]`` → ``[b or 1, 1 or Hkv, 1 or g, T, K]``."""
    return x[:, :, None] if x.shape[1] in (1, kv_heads) else x.unflatten(1, (kv_heads, -1))


def _flat_rows(listed: Tensor, batch: int, kv_heads: int, group: int, keys: int) -> Tensor:
    """Rows of the keys flattened to ``[b·Hkv·M, D]``, int64 ``[b, Hkv or H, T, K]``; an empty slot reads key 0."""
    list_heads = kv_heads if listed.shape[1] in (1, kv_heads) else kv_heads * group
    per_kv = list_heads // kv_heads
    kv_head = torch.arange(list_heads, device=listed.device) // per_kv
    first = torch.arange(batch, device=listed.device)[:, None] * kv_heads + kv_head
    return listed.clamp(min=0).long() + (first * keys)[:, :, None, None]


def _gather(x: Tensor, flat: Tensor, kv_heads: int) -> Tensor:
    """Rows of ``x [b, Hkv, M, D]`` → ``[b, Hkv, g or 1, T, K, D]``."""
    rows = x.reshape(-1, x.shape[-1]).index_select(0, flat.flatten())
    return rows.view(flat.shape[0], kv_heads, -1, *flat.shape[2:], x.shape[-1])


def _list_scores(queries: Tensor, gathered: Tensor) -> Tensor:
    """``[b, Hkv, g, T, D]`` by ``[b, Hkv, g or 1, T, K, D]`` → ``[b, Hkv, g, T, K]``."""
    if gathered.shape[2] == 1:  # a KV group shares its list: its heads are the rows of one product
        return (queries.transpose(2, 3) @ gathered[:, :, 0].transpose(-1, -2)).transpose(2, 3)
    return (queries[..., None, :] @ gathered.transpose(-1, -2))[..., 0, :]


def _weighted_sum(weights: Tensor, gathered: Tensor) -> Tensor:
    """``[b, Hkv, g, T, K]`` by ``[b, Hkv, g or 1, T, K, D]`` → ``[b, Hkv, g, T, D]``."""
    if gathered.shape[2] == 1:
        return (weights.transpose(2, 3) @ gathered[:, :, 0]).transpose(2, 3)
    return (weights[..., None, :] @ gathered)[..., 0, :]


def _outer(weights: Tensor, rows: Tensor, shared: bool) -> Tensor:
    """Gradient rows of gathered keys: ``[b, Hkv, g, T, K]`` and ``[b, Hkv, g, T, D]`` → ``[rows, D]``."""
    if shared:
        return (weights.permute(0, 1, 3, 4, 2) @ rows.transpose(2, 3)).flatten(0, -2)
    return (weights[..., None] * rows[..., None, :]).flatten(0, -2)


def _dropout_factor(scores: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    if generator is None:
        return None
    kept = torch.rand(scores.shape, generator=generator, device=scores.device) >= dropout_p
    return kept.to(scores.dtype) / (1.0 - dropout_p)


def _generator(q: Tensor, dropout_p: float, seed: int) -> torch.Generator | None:
    # The same seed in forward and backward gives the same dropped weights, chunk by chunk.
    return torch.Generator(q.device).manual_seed(seed) if dropout_p > 0.0 else None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: GraphParts,
    *,
    scale: float,
    dropout_p: float,
    seed: int,
    fp32_weights: bool,
) -> tuple[Tensor, Tensor]:
    """``q [B, H, N, D]``, ``k [B, Hkv, M, D]``, ``v [B, Hkv, M, Dv]`` → ``out [B, H, N, Dv]``, ``lse [B, H, N]``."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    out = q.new_empty((batch, heads, queries, v.shape[-1]))
    lse = q.new_empty((batch, heads, queries), dtype=compute)
    generator = _generator(q, dropout_p, seed)
    weight_dtype = compute if fp32_weights else v.dtype
    for chunk, _ in _chunks(q, k, parts, scale, compute):
        values = v[chunk.batch]
        row_lse = _logsumexp(chunk.scores)
        weights = _weights(chunk.scores, row_lse)
        dropped = _dropout_factor(weights, dropout_p, generator)
        if dropped is not None:
            weights = weights * dropped
        # rounding the weights to the dtype of the values is what dense attention in that dtype does
        tile, columns, listed = chunk.split(weights.to(weight_dtype).to(compute))
        result = queries_like(chunk.queries, v.shape[-1])
        if chunk.tile_size:
            result += _tile_sum(tile, values[:, :, chunk.tile].to(compute))
        if chunk.columns is not None:
            result += _tile_sum(columns, values[:, :, chunk.columns].to(compute))
        if chunk.flat is not None:
            result += _weighted_sum(listed, _gather(values, chunk.flat, kv_heads).to(compute))
        out[chunk.batch, :, chunk.rows] = result.flatten(1, 2).to(out.dtype)
        lse[chunk.batch, :, chunk.rows] = row_lse.flatten(1, 2)
    return out, lse


def queries_like(queries: Tensor, dim: int) -> Tensor:
    return queries.new_zeros((*queries.shape[:-1], dim))


def _logsumexp(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], float("-inf"))
    return torch.logsumexp(scores, dim=-1)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # a query without neighbors has lse = -inf: subtract 0 there, so that its weights are exp(-inf) = 0, not NaN
    finite = torch.where(lse == float("-inf"), 0.0, lse)
    return (scores - finite[..., None]).exp()


def _tile_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``[b, Hkv, g, T, C]`` by ``[b, Hkv, C, Dv]`` → ``[b, Hkv, g, T, Dv]``."""
    return (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: GraphParts,
    *,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(q, k, v, bias)``; the last is empty where there is no bias.

    With weights ``p = exp(s - lse)``: ``ds = p · (dO·v - dO·out + dlse)`` (Dao et al., FlashAttention, 2022, with the
    gradient of the log-sum-exp added).
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k.shape[1]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(k.shape, dtype=compute, device=k.device)
    grad_v = torch.zeros(v.shape, dtype=compute, device=v.device)
    grad_bias = torch.zeros(() if parts.bias is None else parts.bias.shape, dtype=compute, device=q.device)
    generator = _generator(q, dropout_p, seed)
    for chunk, part in _chunks(q, k, parts, scale, compute):
        b, rows, shared = chunk.batch, chunk.rows, chunk.gathered is not None and chunk.gathered.shape[2] == 1
        values = v[b]
        d_out = grad_out[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))  # [b, Hkv, g, T, Dv]
        delta = (d_out * out[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))).sum(-1)
        delta = delta - grad_lse[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))
        weights = _weights(chunk.scores, lse[b, :, rows].unflatten(1, (kv_heads, -1)))
        dropped = _dropout_factor(weights, dropout_p, generator)
        kept = weights if dropped is None else weights * dropped
        tile_w, column_w, list_w = chunk.split(kept)
        grads = []
        if chunk.tile_size:
            grad_v[b, :, chunk.tile] += _tile_grad(tile_w, d_out)
            grads.append(_tile_dot(d_out, values[:, :, chunk.tile].to(compute)))
        if chunk.columns is not None:
            grad_v[b, :, chunk.columns] += _tile_grad(column_w, d_out)
            grads.append(_tile_dot(d_out, values[:, :, chunk.columns].to(compute)))
        if chunk.flat is not None:
            grads.append(_list_scores(d_out, _gather(values, chunk.flat, kv_heads).to(compute)))
            rows_v = grad_v[b].view(-1, v.shape[-1])
            rows_v.index_add_(0, chunk.flat.flatten(), _outer(list_w, d_out, shared))
        d_weights = torch.cat(grads, dim=-1) if grads else weights
        if dropped is not None:
            d_weights = d_weights * dropped
        d_scores = weights * (d_weights - delta[..., None])
        tile_s, column_s, list_s = chunk.split(d_scores)
        d_query = torch.zeros_like(chunk.queries)
        if chunk.tile_size:
            d_query += _tile_sum(tile_s, k[b, :, chunk.tile].to(compute))
            grad_k[b, :, chunk.tile] += _tile_grad(tile_s, chunk.queries) * scale
        if chunk.columns is not None:
            d_query += _tile_sum(column_s, k[b][:, :, chunk.columns].to(compute))
            grad_k[b, :, chunk.columns] += _tile_grad(column_s, chunk.queries) * scale
        if chunk.flat is not None and chunk.gathered is not None:
            d_query += _weighted_sum(list_s, chunk.gathered)
            rows_k = grad_k[b].view(-1, k.shape[-1])
            rows_k.index_add_(0, chunk.flat.flatten(), _outer(list_s * scale, chunk.queries, shared))
            if part.bias is not None:
                _add_bias_grad(grad_bias, list_s, b, rows)
        grad_q[b, :, rows] = (d_query * scale).flatten(1, 2).to(q.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


def _tile_dot(rows: Tensor, values: Tensor) -> Tensor:
    """``[b, Hkv, g, T, D]`` by ``[b, Hkv, C, D]`` → ``[b, Hkv, g, T, C]``."""
    return (rows.flatten(2, 3) @ values.transpose(-1, -2)).unflatten(2, rows.shape[2:4])


def _tile_grad(weights: Tensor, rows: Tensor) -> Tensor:
    """``[b, Hkv, g, T, C]`` by ``[b, Hkv, g, T, D]`` → ``[b, Hkv, C, D]``."""
    return weights.flatten(2, 3).transpose(-1, -2) @ rows.flatten(2, 3)


def _add_bias_grad(grad_bias: Tensor, d_scores: Tensor, batch: slice, rows: slice) -> None:
    edges = d_scores.flatten(1, 2)  # [b, H, T, K]
    if grad_bias.shape[1] == 1:
        edges = edges.sum(1, keepdim=True)
    if grad_bias.shape[0] == 1:
        grad_bias[:, :, rows] += edges.sum(0, keepdim=True)
    else:
        grad_bias[batch, :, rows] += edges
