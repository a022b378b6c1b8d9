"""Dense attention for graphs that hold every allowed key, on torch's own fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ssa_framework.graph import NeighborGraph

_CHUNK_ELEMENTS = 2**22


def dense_attention(q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph, *, scale: float, dropout_p: float) -> Tensor:
    """Attention over all keys that ``graph.mask`` allows, ``[B, H, N, Dv]``; zeros for a query that has none.

    Where a mask is needed it is made for a chunk of queries at a time, so memory stays linear in M.
    """
    mask = graph.mask
    grouped = q.shape[1] != k.shape[1]
    plain = mask.key_keep is None and mask.query_segments is None and not mask.has_explicit
    last = q.shape[2] == 1 and mask.offset is not None and mask.offset >= k.shape[2] - 1
    if plain and (last or not mask.causal):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=grouped)
    if plain and mask.offset == 0 and q.shape[2] <= k.shape[2]:
        # torch aligns its causal mask to the first key, as position 0 of the queries does here
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, scale=scale, is_causal=True, enable_gqa=grouped
        )
    step = max(1, _CHUNK_ELEMENTS // max(1, graph.batch * graph.num_heads * graph.num_keys))
    pieces = []
    all_keys = torch.arange(graph.num_keys, dtype=torch.int32, device=q.device).view(1, 1, 1, -1)
    for start in range(0, graph.num_queries, step):
        rows = slice(start, min(start + step, graph.num_queries))
        piece = mask.rows(rows)
        keys = all_keys.expand(1, 1, rows.stop - rows.start, -1)
        if mask.mask_mod is not None:
            keys = keys.expand(graph.batch, -1, -1, -1)
        allowed = piece.structural(keys)
        bias = piece.explicit_bias(keys, graph.num_heads)
        if bias is not None:
            allowed = allowed & (bias > float("-inf"))
        reachable = allowed.any(dim=-1, keepdim=True)
        # a query that may attend nothing attends everything here, and its output is zeroed: never NaN
        attn_mask = allowed | ~reachable
        if bias is not None and mask.is_additive:
            attn_mask = torch.where(allowed, bias, torch.where(reachable, float("-inf"), 0.0)).to(q.dtype)
        out = F.scaled_dot_product_attention(
            q[:, :, rows], k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
        )
        pieces.append(torch.where(reachable, out, 0.0))
    return torch.cat(pieces, dim=2)
