"""CPU kernels: one pass over the keys of a head, and one over the summaries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.numba_runtime import as_array, bare_kernel, parallel_for

_Array = np.ndarray[Any, Any]


@bare_kernel
def _add_up(x: _Array, members: _Array, sizes: _Array, means: _Array) -> None:
    """``x [M, D]``, ``members [R, M]``, ``sizes [C]`` → ``means [C, D]``, which start as zeros."""
    for level in range(members.shape[0]):
        for key in range(x.shape[0]):
            owner = members[level, key]
            if owner >= 0:
                for d in range(x.shape[1]):
                    means[owner, d] += x[key, d]
    for owner in range(means.shape[0]):
        for d in range(x.shape[1]):
            means[owner, d] /= max(1, sizes[owner])


@bare_kernel
def _spread(grad: _Array, members: _Array, sizes: _Array, out: _Array) -> None:
    """``grad [C, D]`` → ``out [M, D]``, which starts as zeros."""
    for level in range(members.shape[0]):
        for key in range(out.shape[0]):
            owner = members[level, key]
            if owner >= 0:
                for d in range(out.shape[1]):
                    out[key, d] += grad[owner, d] / sizes[owner]


def means(x: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """``x [B, Hkv, M, D]``, ``members [B or 1, Hkv or 1, R, M]``, ``sizes [B or 1, Hkv or 1, C]`` →
    ``[B, Hkv, C, D]`` in float32 or float64."""
    batch, heads, _, dim = x.shape
    rows = as_array(x.flatten(0, 1))
    owners, size_of = _per_head(members, batch, heads), _per_head(sizes, batch, heads)
    out = np.zeros((batch * heads, sizes.shape[2], dim), rows.dtype)
    parallel_for(lambda i: _add_up(rows[i], owners[i], size_of[i], out[i]), batch * heads)
    return torch.from_numpy(out).view(batch, heads, -1, dim)


def spread(grad: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """Gradient of `means`: ``grad [B, Hkv, C, D]`` → ``[B, Hkv, M, D]``."""
    batch, heads, _, dim = grad.shape
    rows = as_array(grad.flatten(0, 1))
    owners, size_of = _per_head(members, batch, heads), _per_head(sizes, batch, heads)
    out = np.zeros((batch * heads, members.shape[3], dim), rows.dtype)
    parallel_for(lambda i: _spread(rows[i], owners[i], size_of[i], out[i]), batch * heads)
    return torch.from_numpy(out).view(batch, heads, -1, dim)


def _per_head(x: Tensor, batch: int, heads: int) -> _Array:
    return as_array(x.expand(batch, heads, *x.shape[2:]).flatten(0, 1))
