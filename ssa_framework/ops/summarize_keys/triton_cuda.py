"""CUDA: the keys group by group, then one program adds up each group in the order of its keys; no atomics."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssa_framework.ops.summarize_keys.triton_means import means_kernel, spread_kernel
from ssa_framework.ops.triton_runtime import INTERPRETED, launches

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_GRID = 65535


def serves(x: Tensor) -> bool:
    """Whether the kernels take ``x [B, Hkv, .., D]``."""
    on_device = x.device.type == "cuda" or (x.device.type == "cpu" and INTERPRETED.value)
    return on_device and x.dtype in _DTYPES and max(x.shape[:2]) <= _MAX_GRID


def group_order(members: Tensor, sizes: Tensor) -> Tensor:
    """Places of ``members [B or 1, Hkv or 1, R, M]`` in the last two axes, group by group: int32 ``[B or 1, Hkv or 1,
    R·M]``, those of no group last; within a group ascending."""
    batch, heads, levels, keys = members.shape
    count = sizes.shape[2]
    rows = batch * heads
    wide = torch.int32 if rows * (count + 1) < 2**31 else torch.int64
    first = torch.arange(rows, dtype=wide, device=members.device)[:, None] * (count + 1)
    owner = torch.where(members < 0, count, members).view(rows, levels * keys) + first
    # one sort of all rows, which the numbers of the groups keep apart
    order = owner.flatten().sort(stable=True).indices.view(rows, levels * keys)
    order -= torch.arange(rows, device=members.device)[:, None] * (levels * keys)
    return order.int().view(batch, heads, levels * keys)


@launches
def means(x: Tensor, members: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]``, ``members [B or 1, Hkv or 1, R, M]``, ``sizes [B or 1, Hkv or 1, C]`` and their
    `group_order` → float32 ``[B, Hkv, C, D]``."""
    batch, heads, keys, dim = x.shape
    count = sizes.shape[2]
    out = torch.empty((batch, heads, count, dim), dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    sizes = sizes.contiguous()
    means_kernel[(count, heads, batch)](
        x, *x.stride(), order, *_strides(order), sizes, sizes.cumsum(2, dtype=torch.int32), *_strides(sizes), out, keys,
        D=dim, W=triton.next_power_of_2(dim), KEYS=16, num_warps=1,
    )  # fmt: skip
    return out


@launches
def spread(grad: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """Gradient of `means`: float32 ``[B, Hkv, C, D]`` → ``[B, Hkv, M, D]``."""
    batch, heads, count, dim = grad.shape
    levels, keys = members.shape[2:]
    out = torch.zeros((batch, heads, keys, dim), dtype=torch.float32, device=grad.device)
    if not out.numel() or not count:
        return out
    block = 32
    spread_kernel[(triton.cdiv(keys, block), heads, batch)](
        grad.contiguous(), members.contiguous(), *_strides(members), sizes.contiguous(), *_strides(sizes), out, keys,
        count, levels, D=dim, W=triton.next_power_of_2(dim), KEYS=block, num_warps=4,
    )  # fmt: skip
    return out


def _strides(x: Tensor) -> tuple[int, int]:
    """Of batch and heads of a contiguous tensor, 0 = broadcast."""
    inner = x[0, 0].numel()
    return (0 if x.shape[0] == 1 else x.shape[1] * inner), (0 if x.shape[1] == 1 else inner)
