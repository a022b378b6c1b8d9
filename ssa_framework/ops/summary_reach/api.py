"""`reaches_later`: choose an implementation."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ssa_framework.ops.summary_reach import torch_search


@torch.no_grad()
def reaches_later(members: Tensor, count: int, first: Tensor, stop: Tensor, positions: Tensor) -> Tensor:
    """Whether some query attends a summary that holds a key after it; the host does not wait for the answer.

    Args:
        members: int32 ``[B or 1, Hkv or 1, R, M]``, the groups of each key, one of each of R levels, below ``count``;
            -1 = none.
        first, stop: int32 ``[B or 1, N, R]``: a query attends the groups from ``first`` to ``stop - 1``, of each level.
        positions: int32 ``[B or 1, N]``, where the queries stand.

    Returns:
        bool, without dimensions.
    """
    if members.is_cuda and find_spec("triton") is not None:
        from ssa_framework.ops.summary_reach import triton_cuda  # Triton takes a moment to import

        return triton_cuda.reaches_later(members, count, first, stop, positions)
    return torch_search.reaches_later(members, count, first, stop, positions)
