"""What Triton kernels share: whether they run in the interpreter, and a matrix product that works there too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether ``TRITON_INTERPRET=1`` was set when this module was imported: kernels then run on CPU tensors."""

PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)
"""Whether kernels are compiled by way of PTX, so that they may hold some."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a [m, k] @ b [k, n] + acc [m, n]`` in float32."""
    if INTERPRETED:
        # the interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
