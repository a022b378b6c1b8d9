"""`any_outside`: choose an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ssa_framework.ops.index_bounds import torch_reduce
from ssa_framework.proposals import Bounds


@torch.no_grad()
def any_outside(bounds: Sequence[Bounds], device: torch.device) -> Tensor:
    """Whether some element is outside of its bounds: bool, 0-dim, on ``device``, which all tensors are on.

    In Triton on a GPU, one launch for each of ``bounds``, and nobody waits for the answer.
    """
    if device.type == "cuda" and find_spec("triton") is not None:
        from ssa_framework.ops.index_bounds import triton_cuda  # Triton takes a moment to import

        return triton_cuda.any_outside(bounds, device)
    return torch_reduce.any_outside(bounds, device)
