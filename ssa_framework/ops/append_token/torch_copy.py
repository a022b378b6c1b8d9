"""A copy for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.append_token.types import TokenPlace


@torch.no_grad()
def append_token(place: TokenPlace, q: Tensor, k: Tensor, v: Tensor, position: int) -> None:
    """See `ssa_framework.ops.append_token.api.append_token`."""
    place.q.copy_(q)
    place.keys[:, :, position].copy_(k[:, :, 0])
    place.values[:, :, position].copy_(v[:, :, 0])
    place.position.fill_(position)
