"""How well a language model predicts a text, with the attention that it has at the moment."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_framework.errors import ShapeError

MOST_SCORED = 1024
"""Predictions that a perplexity is the mean of, where nobody says how many."""


def token_losses(model: Any, ids: Tensor, *, scored: int | None = None) -> Tensor:
    """Negative log-likelihood of the last tokens of a text, each predicted from everything before it.

    One forward pass without gradients and without a cache, so this is prefill. Of two kinds of attention, compare the
    losses token by token: most of their spread is the text's, and the same for both.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: int64 ``[1, N]``, N >= 2.
        scored: how many tokens; the last half, up to `MOST_SCORED`, if left out.

    Returns: float64 ``[scored]`` on the CPU, in nats.

    Raises:
        ShapeError: ids of another shape, or ``scored`` outside ``[1, N)``.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ShapeError(f"ids must be integers [1, N] with N >= 2, got {ids.dtype} {list(ids.shape)}")
    length = ids.shape[1]
    if scored is None:
        scored = min(MOST_SCORED, length // 2)
    if isinstance(scored, bool) or not isinstance(scored, int) or not 1 <= scored < length:
        raise ShapeError(f"scored must be an integer in [1, {length}), the length, got {scored!r}")
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=scored + 1, use_cache=False).logits[0, -scored - 1 : -1]
        losses = F.cross_entropy(logits.float(), ids[0, -scored:], reduction="none")
    return losses.double().cpu()


def perplexity(model: Any, ids: Tensor, *, scored: int | None = None) -> float:
    """Of the last tokens of a text ``ids [1, N]``: the exponential of the mean of `token_losses`."""
    return math.exp(float(token_losses(model, ids, scored=scored).mean()))
