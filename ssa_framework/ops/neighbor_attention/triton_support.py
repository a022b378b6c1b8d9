"""Which calls the Triton implementation serves; importing this does not import Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_WIDTH = 256
"""The largest head dimension that is served."""

_MAX_GRID = 65535  # programs along the second and third axis of a grid


def installed() -> bool:
    spec = find_spec("triton")
    return spec is not None and spec.origin is not None  # any folder of that name would do as a namespace package


def works_here() -> bool:
    """Whether there is anything to run kernels on: a GPU, or Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return installed() and (torch.cuda.is_available() or interpreted)


def why_not(q: Tensor, v: Tensor, dropout_p: float, has_bias: bool) -> str | None:
    """Why the kernels cannot serve a call with ``q [B, H, N, D]`` and ``v [B, Hkv, M, Dv]``, if they cannot."""
    reason = _why_not_on(q.device, q.dtype)
    if reason is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"it serves head dimensions up to {MAX_WIDTH}, got {q.shape[-1]} and {v.shape[-1]}"
    if max(q.shape[0], q.shape[1]) > _MAX_GRID:
        return f"it serves up to {_MAX_GRID} batch elements and heads, got {list(q.shape)}"
    if dropout_p > 0.0:
        return "it has no dropout"
    if has_bias:
        return "it adds no bias to single edges (an additive mask, or one per query head with graph_heads='kv')"
    return None


@torch.compiler.assume_constant_result  # what is installed cannot be traced
def _why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    if not installed():
        return "the package triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 or float32, the tensors are {dtype}"
    from ssa_framework.ops import triton_runtime  # Triton takes a moment to import

    if device.type != "cuda" and not (device.type == "cpu" and triton_runtime.INTERPRETED.value):
        return f"it needs CUDA tensors (or, to try it on a CPU, TRITON_INTERPRET=1), the tensors are on {device}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return None
