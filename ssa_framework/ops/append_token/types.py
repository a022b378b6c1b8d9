"""`TokenPlace`: the tensors that a captured step reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenPlace(NamedTuple):
    """Where a new token is put: ``q [B, H, 1, D]``, contiguous, its position, int32 ``[1, 1]``, and the rooms of its
    key ``[B, Hkv, room, D]`` and its value ``[B, Hkv, room, Dv]``, contiguous."""

    q: Tensor
    position: Tensor
    keys: Tensor
    values: Tensor
