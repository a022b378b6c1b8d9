"""CUDA: one launch for all, a program for each head of each batch element."""

from __future__ import annotations

import triton
from torch import Tensor

from ssa_framework.ops.append_token.triton_copy import append_token_kernel
from ssa_framework.ops.append_token.types import TokenPlace
from ssa_framework.ops.triton_runtime import launches


@launches
def append_token(place: TokenPlace, q: Tensor, k: Tensor, v: Tensor, position: int) -> None:
    """See `ssa_framework.ops.append_token.api.append_token`."""
    batch, heads, _, dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[3]
    append_token_kernel[(max(heads, kv_heads), batch)](
        q, q.stride(0), q.stride(1), q.stride(3), k, k.stride(0), k.stride(1), k.stride(3),
        v, v.stride(0), v.stride(1), v.stride(3), *place, position, place.keys.shape[2],
        HEADS=heads, KV_HEADS=kv_heads, D=dim, DV=value_dim, W=triton.next_power_of_2(max(dim, value_dim)), num_warps=1,
    )  # fmt: skip
