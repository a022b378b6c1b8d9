"""CUDA: a launch for each pair of bounds; all of them write to one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ssa_framework.ops.index_bounds.triton_outside import outside_kernel
from ssa_framework.ops.triton_runtime import launches
from ssa_framework.proposals import Bounds

_BLOCK = 4096


@launches
def any_outside(bounds: Sequence[Bounds], device: torch.device) -> Tensor:
    """See `ssa_framework.ops.index_bounds.api.any_outside`."""
    found = torch.zeros((), dtype=torch.int32, device=device)
    for first, last, low, high in bounds:
        one = first is last
        first, last = (_once(first),) * 2 if one else (x.contiguous() for x in torch.broadcast_tensors(first, last))
        if first.numel():
            outside_kernel[(triton.cdiv(first.numel(), _BLOCK),)](
                first, None if one else last, found, first.numel(), low, high, BLOCK=_BLOCK, num_warps=4
            )
    return found != 0


def _once(x: Tensor) -> Tensor:
    """Contiguous, without the copies of an axis that is expanded."""
    for axis in range(x.dim()):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x.contiguous()
