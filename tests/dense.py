"""Dense attention under a boolean mask, written out: what sparse attention over a graph must equal."""

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, M, D]``, ``mask`` bool ``[B, H, N, M]``; zeros for a row without keys."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    reachable = mask.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(mask | ~reachable), float("-inf")).softmax(dim=-1)
    return torch.where(reachable, weights @ v, 0.0) if mask.shape[-1] else torch.zeros_like(q @ v.transpose(-1, -2) @ v)
