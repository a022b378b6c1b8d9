"""The oracle: dense attention under the boolean mask of the graph, in plain torch with plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.parts import GraphParts

MAX_ELEMENTS = 2**27
"""Most scores (B·H·N·M) that the reference computes; it stores all of them several times."""


def dense_bias(parts: GraphParts, batch: int, heads: int, queries: int, keys: int, like: Tensor) -> Tensor:
    """What the graph adds to dense scores ``[B, H, N, M + C]`` of keys and summaries: 0, the bias or the log-weight on
    an edge, -inf elsewhere."""
    device = like.device
    all_rows, all_keys = slice(0, queries), torch.arange(keys, device=device)
    positions = torch.arange(queries, device=device) + parts.query_offset
    fixed = parts.restrict(parts.span_allowed(positions, all_rows, all_keys), all_rows, all_keys)
    if parts.has_band:
        fixed = fixed | parts.restrict(parts.band_allowed(positions, all_rows, all_keys), all_rows, all_keys)
    if parts.columns is not None:
        is_column = torch.isin(all_keys, parts.columns.long())
        allowed = parts.columns_allowed(positions, all_rows, all_keys) & is_column
        fixed = fixed | parts.restrict(allowed, all_rows, all_keys)
    total = torch.where(fixed, 0.0, float("-inf")).to(like.dtype).expand(batch, heads, -1, -1)
    for listed, bias in ((parts.neighbors, parts.bias), (parts.slice_keys(positions, all_rows, keys), None)):
        if listed is not None:
            total = _with_list(total, listed, bias)
    seen = parts.summaries_allowed(all_rows)
    if seen is None or parts.summary_log_weight is None:
        return total
    weight = parts.summary_log_weight.to(like.dtype).repeat_interleave(heads // parts.summary_log_weight.shape[1], 1)
    seen = seen.repeat_interleave(heads // seen.shape[1], dim=1) if seen.shape[1] > 1 else seen
    return torch.cat([total, torch.where(seen, weight[:, :, None], float("-inf")).expand(batch, -1, -1, -1)], dim=-1)


def _with_list(total: Tensor, listed: Tensor, bias: Tensor | None) -> Tensor:
    batch, heads, queries, keys = total.shape
    edge = torch.zeros((), dtype=total.dtype, device=total.device) if bias is None else bias.to(total.dtype)
    if listed.shape[1] > 1:
        listed = listed.repeat_interleave(heads // listed.shape[1], dim=1)
    listed = listed.expand(batch, heads, -1, -1)
    edge = torch.where(listed < 0, float("-inf"), edge).expand_as(listed)
    # One spare column takes the empty slots; a listed key is in no other part, so nothing is overwritten.
    padded = torch.cat([total, total.new_full((batch, heads, queries, 1), float("-inf"))], dim=-1)
    slots = torch.where(listed < 0, keys, listed).long()
    return padded.scatter(-1, slots, edge)[..., :keys]


def forward(
    q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, *, scale: float, dropout_p: float, fp32_weights: bool
) -> tuple[Tensor, Tensor]:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, M, D]`` → ``out [B, H, N, Dv]``, ``lse [B, H, N]``."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(compute)
    if parts.summary_k is not None and parts.summary_v is not None:
        k = torch.cat([k, parts.summary_k.to(compute)], dim=2)
        v = torch.cat([v, parts.summary_v.to(v.dtype)], dim=2)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q.to(compute) @ k.transpose(-1, -2) * scale
    bias = dense_bias(parts, batch, heads, queries, keys, scores)
    scores = torch.where(bias == float("-inf"), float("-inf"), scores + bias)
    lse = torch.logsumexp(scores, dim=-1) if k.shape[2] else scores.new_full(scores.shape[:-1], float("-inf"))
    reachable = (lse > float("-inf"))[..., None]
    weights = torch.where(scores > float("-inf"), (scores - torch.where(reachable, lse[..., None], 0.0)).exp(), 0.0)
    if dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    if not fp32_weights:
        weights = weights.to(v.dtype)
    out = weights @ v.to(weights.dtype)
    return out.to(q.dtype), lse
