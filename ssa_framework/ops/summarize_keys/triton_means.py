"""The kernels: the mean of a group of rows, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def means_kernel(
    x, x_batch, x_head, x_row, x_dim, order, order_batch, order_head, sizes, ends, sizes_batch, sizes_head, means,
    num_keys, D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``means [B, Hkv, C, D]`` of group ``program_id(0)``: of the rows of ``x`` at ``order`` modulo ``num_keys``, from
    the end of the group before to its own in ``ends [.., C]``. Zeros for a group of size 0."""
    group = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * sizes_batch + head * sizes_head + group
    size = tl.load(sizes + at)
    begin = order + batch * order_batch + head * order_head + tl.load(ends + at) - size
    dims = tl.arange(0, W)
    start = x + batch * x_batch + head * x_head + dims[None, :] * x_dim
    total = tl.zeros((W,), tl.float32)
    for first in range(0, size, KEYS):
        nth = first + tl.arange(0, KEYS)
        key = tl.load(begin + nth, mask=nth < size, other=0) % num_keys
        inside = (nth < size)[:, None] & (dims < D)[None, :]
        # [KEYS, W]
        rows = tl.load(start + key[:, None].to(tl.int64) * x_row, mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    out = means + ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + group) * D
    tl.store(out + dims, total / tl.maximum(size, 1).to(tl.float32), mask=dims < D)


@triton.jit
def spread_kernel(
    grad, members, members_batch, members_head, sizes, sizes_batch, sizes_head, out, num_keys, count, levels,
    D: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``out [B, Hkv, M, D]`` of ``KEYS`` keys from ``program_id(0)`` on: of each of its groups, the gradient ``grad [B,
    Hkv, C, D]`` by the size."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, W)[None, :]
    of_head = batch * tl.num_programs(1) + head
    total = tl.zeros((KEYS, W), tl.float32)
    for level in range(levels):
        at = members + batch * members_batch + head * members_head + level * num_keys + key
        owner = tl.load(at, mask=key < num_keys, other=-1)
        size = tl.load(sizes + batch * sizes_batch + head * sizes_head + owner, mask=owner >= 0, other=1)
        inside = (owner >= 0)[:, None] & (dims < D)
        rows = tl.load(grad + (of_head * count + owner.to(tl.int64))[:, None] * D + dims, mask=inside, other=0.0)
        total += rows / size.to(tl.float32)[:, None]
    tl.store(out + (of_head * num_keys + key)[:, None] * D + dims, total, mask=(key < num_keys)[:, None] & (dims < D))
