"""Plain torch, any device, forward and backward: a chunk of queries at a time.

Of a chunk, the band and the span are dense tiles of consecutive keys, the columns and the summaries are two more
tiles, and the listed keys are gathered; all scores of a query meet in one softmax, which is the log-sum-exp merge of
the parts. The backward pass computes the same scores again from ``lse``, so nothing of size N·K·D is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.ops.key_lists import cat_keys
from ssa_framework.ops.neighbor_attention.parts import GraphParts

WORK_BYTES = 32 * 2**20
"""What the temporaries of one chunk may take, about."""

_Rows = slice | Tensor
"""Rows of a table: consecutive ones, or numbers int64 ``[C]``."""


@dataclass(frozen=True)
class _Tile:
    """Keys that all queries of a chunk are scored against; ``of_summaries``: pseudo-keys instead."""

    keys: _Rows
    size: int
    of_summaries: bool = False


@dataclass(frozen=True)
class _Chunk:
    """Scores and edges of a chunk of T queries: b batch elements, Hkv KV heads, g query heads each, E edges."""

    batch: slice
    rows: slice
    queries: Tensor  # [b, Hkv, g, T, D]
    tiles: list[_Tile]
    flat: Tensor | None  # int64 [b, Hx, T, K], rows of the flattened keys; Hx = Hkv or H
    gathered: Tensor | None  # keys [b, Hkv, g or 1, T, K, D]
    scores: Tensor  # [b, Hkv, g, T, E], -inf where there is no edge

    def split(self, edges: Tensor) -> tuple[list[Tensor], Tensor]:
        """``[..., E]`` → the edges of each tile, and those of the lists."""
        sizes = [tile.size for tile in self.tiles] + [0 if self.flat is None else self.flat.shape[-1]]
        *tiles, listed = edges.split(sizes, dim=-1)
        return tiles, listed


@dataclass(frozen=True)
class _Tables:
    """Rows that are attended, and pseudo-rows, of keys or of values."""

    rows: Tensor  # [B, Hkv, M, D]
    summaries: Tensor | None  # [B, Hkv, C, D]

    def tile(self, batch: slice, tile: _Tile, compute: torch.dtype) -> Tensor:
        """``[b, Hkv, size, D]``."""
        table = self.summaries if tile.of_summaries else self.rows
        assert table is not None
        return table[batch][:, :, tile.keys].to(compute)

    def add(self, batch: slice, tile: _Tile, x: Tensor) -> None:
        table = self.summaries if tile.of_summaries else self.rows
        assert table is not None
        table[batch, :, tile.keys] += x


def _chunks(
    q: Tensor, k: _Tables, parts: GraphParts, scale: float, compute: torch.dtype
) -> Iterator[tuple[_Chunk, GraphParts]]:
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.rows.shape[1:3]
    listed = parts.neighbors.shape[-1] if parts.neighbors is not None else 0
    lists = [x for x in (parts.neighbors, parts.slice_order, parts.slice_start) if x is not None]
    list_heads = heads if any(x.shape[1] > kv_heads for x in lists) else kv_heads
    columns = parts.columns.numel() if parts.columns is not None else 0
    width = 0 if not parts.has_band else min(keys, parts.band_before + parts.band_after + 1)
    summaries = parts.summary_log_weight.shape[2] if parts.summary_log_weight is not None else 0
    span = _most(parts.span_end, parts.span_start)
    if parts.slice_start is not None and parts.slice_end is not None:
        listed += _most(parts.slice_end.sum(-1), parts.slice_start.sum(-1))
    fixed = width + columns + summaries + span
    # a row needs its scores (three copies of E at the peak) and its gathered keys or values
    row_bytes = 4 * (heads * 3 * (fixed + listed) + list_heads * 2 * listed * dim)
    rows_at_once = max(1, WORK_BYTES // max(1, row_bytes))
    batch_step = max(1, min(batch, rows_at_once // 64))
    row_step = max(1, min(queries, rows_at_once // batch_step))
    tile = width if width < keys else 0
    if tile or span:  # the tile of T queries is T + width keys wide, so T beyond the width only wastes
        row_step = min(row_step, max(64, tile, span))
    for b in range(0, batch, batch_step):
        batch_slice = slice(b, min(b + batch_step, batch))
        part = parts.batch_element(batch_slice)
        for r in range(0, queries, row_step):
            rows = slice(r, min(r + row_step, queries))
            yield _score(q, k, part, scale, compute, batch_slice, rows), part


def _most(end: Tensor | None, start: Tensor | None) -> int:
    """The largest difference."""
    return 0 if end is None or start is None or not end.numel() else max(0, int((end - start).max()))


def _score(
    q: Tensor, k: _Tables, parts: GraphParts, scale: float, compute: torch.dtype, batch: slice, rows: slice
) -> _Chunk:
    kv_heads, keys = k.rows.shape[1:3]
    queries = q[batch, :, rows].to(compute).unflatten(1, (kv_heads, -1))  # [b, Hkv, g, T, D]
    positions = torch.arange(rows.start, rows.stop, device=q.device) + parts.query_offset
    tiles, pieces = [], []
    for tile, allowed in _key_tiles(parts, positions, rows, keys):
        tiles.append(tile)
        pieces.append(_tile_scores(queries, k.tile(batch, tile, compute), allowed, scale))
    seen = parts.summaries_allowed(rows)
    if seen is not None and parts.summary_log_weight is not None and seen.shape[-1]:
        tile = _Tile(slice(0, seen.shape[-1]), seen.shape[-1], of_summaries=True)
        scores = _tile_products(queries, k.tile(batch, tile, compute)) * scale
        scores = scores + parts.summary_log_weight.to(compute)[:, :, None, None]
        tiles.append(tile)
        pieces.append(scores.masked_fill(~_by_group(seen, kv_heads), float("-inf")))
    flat = gathered = None
    listed, bias = _lists(parts, positions, rows, keys)
    if listed is not None and listed.shape[-1] and keys:
        flat = _flat_rows(listed, queries.shape[0], kv_heads, queries.shape[2], keys)
        gathered = _gather(k.rows[batch], flat, kv_heads).to(compute)
        scores = _list_scores(queries, gathered) * scale
        if bias is not None:
            scores = scores + _by_group(bias.to(compute), kv_heads)
        pieces.append(scores.masked_fill(_by_group(listed < 0, kv_heads), float("-inf")))
    scores = torch.cat(pieces, dim=-1) if pieces else queries.new_empty((*queries.shape[:-1], 0))
    return _Chunk(batch, rows, queries, tiles, flat, gathered, scores)


def _key_tiles(parts: GraphParts, positions: Tensor, rows: slice, keys: int) -> Iterator[tuple[_Tile, Tensor]]:
    """Span, band and columns of some rows, with what is allowed of them, bool ``[B or 1, 1, T, size]``."""
    low, high = parts.span_tile(rows, keys)
    if high > low:
        numbers = torch.arange(low, high, device=positions.device)
        allowed = parts.span_allowed(positions, rows, numbers)
        yield _Tile(slice(low, high), high - low), parts.restrict(allowed, rows, numbers)
    low, high = parts.tile(rows, keys)
    if high > low:
        numbers = torch.arange(low, high, device=positions.device)
        allowed = parts.band_allowed(positions, rows, numbers)
        yield _Tile(slice(low, high), high - low), parts.restrict(allowed, rows, numbers)
    if parts.columns is not None and parts.columns.numel():
        numbers = parts.columns.long()
        allowed = parts.columns_allowed(positions, rows, numbers)
        yield _Tile(numbers, numbers.numel()), parts.restrict(allowed, rows, numbers)


def _lists(parts: GraphParts, positions: Tensor, rows: slice, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Lists and slices of some rows as one list, and the bias of it."""
    listed = None if parts.neighbors is None else parts.neighbors[:, :, rows]
    bias = None if parts.bias is None else parts.bias[:, :, rows]
    sliced = parts.slice_keys(positions, rows, keys)
    if sliced is None:
        return listed, bias
    if listed is None:
        return sliced, None
    if bias is not None:
        bias = torch.cat([bias, bias.new_zeros((*bias.shape[:3], sliced.shape[-1]))], dim=-1)
    return cat_keys([listed, sliced]), bias


def _tile_scores(queries: Tensor, keys: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """``[b, Hkv, g, T, D]`` by ``[b, Hkv, C, D]`` → ``[b, Hkv, g, T, C]``; ``allowed`` is ``[b or 1, 1, T, C]``."""
    return (_tile_products(queries, keys) * scale).masked_fill(~allowed[:, :, None], float("-inf"))


def _tile_products(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, queries.shape[2:4])


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
    value_table = _Tables(v, parts.summary_v)
    for chunk, _ in _chunks(q, _Tables(k, parts.summary_k), parts, scale, compute):
        row_lse = _logsumexp(chunk.scores)
        weights = _weights(chunk.scores, row_lse)
        dropped = _dropout_factor(weights, dropout_p, generator)
        if dropped is not None:
            weights = weights * dropped
        # rounding the weights to the dtype of the values is what dense attention in that dtype does
        in_tiles, listed = chunk.split(weights.to(weight_dtype).to(compute))
        result = chunk.queries.new_zeros((*chunk.queries.shape[:-1], v.shape[-1]))
        for tile, part in zip(chunk.tiles, in_tiles, strict=True):
            result += _tile_sum(part, value_table.tile(chunk.batch, tile, compute))
        if chunk.flat is not None:
            result += _weighted_sum(listed, _gather(v[chunk.batch], chunk.flat, kv_heads).to(compute))
        out[chunk.batch, :, chunk.rows] = result.flatten(1, 2).to(out.dtype)
        lse[chunk.batch, :, chunk.rows] = row_lse.flatten(1, 2)
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(q, k, v, bias, summary_k, summary_v)``; zeros without dimensions for what is not there.

    With weights ``p = exp(s - lse)``: ``ds = p · (dO·v - dO·out + dlse)`` (Dao et al., FlashAttention, 2022, with the
    gradient of the log-sum-exp added).
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k.shape[1]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)

    def zeros(like: Tensor | None) -> Tensor:
        return torch.zeros(() if like is None else like.shape, dtype=compute, device=q.device)

    grad_bias = zeros(parts.bias)
    k_table, v_table = _Tables(k, parts.summary_k), _Tables(v, parts.summary_v)
    grad_k, grad_v = (_Tables(zeros(x.rows), zeros(x.summaries)) for x in (k_table, v_table))
    generator = _generator(q, dropout_p, seed)
    for chunk, part in _chunks(q, k_table, parts, scale, compute):
        b, rows, shared = chunk.batch, chunk.rows, chunk.gathered is not None and chunk.gathered.shape[2] == 1
        d_out = grad_out[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))  # [b, Hkv, g, T, Dv]
        delta = (d_out * out[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))).sum(-1)
        delta = delta - grad_lse[b, :, rows].to(compute).unflatten(1, (kv_heads, -1))
        weights = _weights(chunk.scores, lse[b, :, rows].unflatten(1, (kv_heads, -1)))
        dropped = _dropout_factor(weights, dropout_p, generator)
        kept = weights if dropped is None else weights * dropped
        tile_weights, list_weights = chunk.split(kept)
        grads = []
        for tile, tile_weight in zip(chunk.tiles, tile_weights, strict=True):
            grad_v.add(b, tile, _tile_grad(tile_weight, d_out))
            grads.append(_tile_products(d_out, v_table.tile(b, tile, compute)))
        if chunk.flat is not None:
            grads.append(_list_scores(d_out, _gather(v[b], chunk.flat, kv_heads).to(compute)))
            rows_v = grad_v.rows[b].view(-1, v.shape[-1])
            rows_v.index_add_(0, chunk.flat.flatten(), _outer(list_weights, d_out, shared))
        d_weights = torch.cat(grads, dim=-1) if grads else weights
        if dropped is not None:
            d_weights = d_weights * dropped
        d_scores = weights * (d_weights - delta[..., None])
        tile_scores, list_scores = chunk.split(d_scores)
        d_query = torch.zeros_like(chunk.queries)
        for tile, tile_score in zip(chunk.tiles, tile_scores, strict=True):
            d_query += _tile_sum(tile_score, k_table.tile(b, tile, compute))
            grad_k.add(b, tile, _tile_grad(tile_score, chunk.queries) * scale)
        if chunk.flat is not None and chunk.gathered is not None:
            d_query += _weighted_sum(list_scores, chunk.gathered)
            rows_k = grad_k.rows[b].view(-1, k.shape[-1])
            rows_k.index_add_(0, chunk.flat.flatten(), _outer(list_scores * scale, chunk.queries, shared))
            if part.bias is not None:
                _add_bias_grad(grad_bias, list_scores[..., : part.bias.shape[-1]], b, rows)
        grad_q[b, :, rows] = (d_query * scale).flatten(1, 2).to(q.dtype)
    assert grad_k.summaries is not None
    assert grad_v.summaries is not None
    of_keys, of_values = grad_k.rows.to(k.dtype), grad_v.rows.to(v.dtype)
    return grad_q, of_keys, of_values, grad_bias, grad_k.summaries, grad_v.summaries


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
