"""The kernel that takes in one token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["place", "room"])
def append_token_kernel(
    q, q_batch, q_head, q_dim, k, k_batch, k_head, k_dim, v, v_batch, v_head, v_dim,
    kept_q, kept_position, keys, values, place, room,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Head ``program_id(0)`` of ``q [B, H, 1, D]``, ``k [B, Hkv, 1, D]`` and ``v [B, Hkv, 1, Dv]``, batch element
    ``program_id(1)``, and the position ``place``, to the fields of `TokenPlace`; ``room``: places of a head there."""
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, W)
    of_query = dims < tl.where(head < HEADS, D, 0)
    of_key = dims < tl.where(head < KV_HEADS, D, 0)
    of_value = dims < tl.where(head < KV_HEADS, DV, 0)
    # all on their way before any is used
    query = tl.load(q + batch * q_batch + head * q_head + dims * q_dim, mask=of_query)
    key = tl.load(k + batch * k_batch + head * k_head + dims * k_dim, mask=of_key)
    value = tl.load(v + batch * v_batch + head * v_head + dims * v_dim, mask=of_value)
    tl.store(kept_q + (batch * HEADS + head) * D + dims, query, mask=of_query)
    row = (batch * KV_HEADS + head) * room + place
    tl.store(keys + row * D + dims, key, mask=of_key)
    tl.store(values + row * DV + dims, value, mask=of_value)
    if head + batch == 0:
        tl.store(kept_position, place)
